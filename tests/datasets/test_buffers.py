import os
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from villa.datasets import collation as buffers
from villa.datasets.collation import LARGE, empty


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


def test_memory_that_autograd_saved_is_not_used_again() -> None:
    batch = empty(LARGE, dtype=torch.float32).fill_(3.0)
    address = batch.data_ptr()
    weight = torch.ones((), requires_grad=True)
    loss = (weight * batch).sum()  # the graph alone holds the batch from here on
    del batch
    other = empty(LARGE, dtype=torch.float32).zero_()
    assert other.data_ptr() != address
    loss.backward()
    assert weight.grad == 3.0 * LARGE
    del loss
    assert empty(LARGE, dtype=torch.float32).data_ptr() == address


def test_memory_that_numpy_or_a_storage_holds_is_not_used_again() -> None:
    for hold in (torch.Tensor.numpy, torch.Tensor.untyped_storage):
        tensor = empty(LARGE, dtype=torch.float32)
        address, held = tensor.data_ptr(), hold(tensor)
        del tensor
        assert empty(LARGE, dtype=torch.float32).data_ptr() != address
        del held


class _Batches(Dataset[torch.Tensor]):
    """Every batch is full of its own number."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return empty(LARGE + index, dtype=torch.uint8).fill_(index)


def test_batches_of_forked_workers_stay_as_they_were_made() -> None:
    kept = empty(LARGE, dtype=torch.uint8).fill_(99)
    free = empty(LARGE, dtype=torch.uint8)
    del free  # the workers inherit a kept buffer and one in use
    loader = DataLoader(_Batches(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    batches = list(loader)
    for number, batch in enumerate(batches):
        assert batch.min() == batch.max() == number
    assert kept.min() == kept.max() == 99


def test_a_forked_child_does_not_write_to_its_parents_memory() -> None:
    kept = empty(LARGE, dtype=torch.uint8).fill_(5)
    child = os.fork()
    if not child:
        kept.fill_(6)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert kept.min() == kept.max() == 5
