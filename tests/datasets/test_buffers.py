import threading

import pytest
import torch

from villa.datasets import buffers
from villa.datasets.buffers import LARGE, empty


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    buffers._free.clear()


def test_has_shape_and_type_at_any_size() -> None:
    for rows in (1, LARGE // 8, LARGE // 2):
        tensor = empty(rows, 3, dtype=torch.float32)
        assert tensor.shape == (rows, 3)
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        tensor.fill_(1.0)
        assert tensor.sum() == 3 * rows


def test_memory_is_used_again_only_when_all_tensors_on_it_are_gone() -> None:
    first = empty(LARGE, dtype=torch.float32)
    address, view = first.data_ptr(), first[5:]
    del first
    second = empty(LARGE, dtype=torch.float32)
    assert second.data_ptr() != address
    view.fill_(7.0)
    second.zero_()
    assert view.min() == 7.0
    del view
    assert empty(LARGE - 9, dtype=torch.float32).data_ptr() == address


def test_a_much_larger_buffer_is_not_wasted_on_a_small_tensor() -> None:
    large = empty(8 * LARGE, dtype=torch.uint8)
    address = large.data_ptr()
    del large
    assert empty(LARGE, dtype=torch.uint8).data_ptr() != address
    assert empty(8 * LARGE, dtype=torch.uint8).data_ptr() == address


def test_few_buffers_are_kept() -> None:
    tensors = [empty(LARGE, dtype=torch.uint8) for _ in range(5)]
    del tensors
    assert len(buffers._free) == buffers.KEPT


def test_threads_never_share_memory() -> None:
    wrong = []

    def fill(value: int) -> None:
        for _ in range(30):
            tensor = empty(LARGE, dtype=torch.uint8)
            tensor.fill_(value)
            if tensor.min() != value or tensor.max() != value:
                wrong.append(value)

    threads = [threading.Thread(target=fill, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
