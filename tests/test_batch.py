"""The container of a micro-batch."""

import pytest
import torch
from tiny import tiny_batch

from villa.batch import Batch


def test_a_batch_is_as_long_as_its_ids() -> None:
    assert len(tiny_batch(examples=5)) == 5


def test_map_changes_every_tensor_and_leaves_the_original() -> None:
    batch = tiny_batch()
    doubled = batch.map(lambda tensor: tensor * 2)
    assert doubled.ids == batch.ids
    assert doubled.token_type_ids is None
    for name in ("input_ids", "attention_mask", "features", "boxes", "region_mask", "targets"):
        before, after = getattr(batch, name), getattr(doubled, name)
        assert after.equal(before * 2), name


def test_map_changes_the_tensors_of_mappings() -> None:
    batch = Batch(ids=["a"], inputs={"grid": torch.ones(2)}, part_targets={"words": torch.tensor([3])})
    doubled = batch.map(lambda tensor: tensor * 2)
    assert doubled.inputs is not None
    assert doubled.part_targets is not None
    assert doubled.inputs["grid"].tolist() == [2, 2]
    assert doubled.part_targets["words"].tolist() == [6]
    assert batch.part_targets is not None
    assert batch.part_targets["words"].tolist() == [3]


def test_to_moves_every_tensor() -> None:
    moved = tiny_batch().to("meta")
    assert {getattr(moved, name).device.type for name in ("input_ids", "features", "targets")} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_pin_memory() -> None:
    features = tiny_batch().pin_memory().features
    assert features is not None
    assert features.is_pinned()


def test_a_batch_of_ids_alone() -> None:
    batch = Batch(ids=["a"])
    assert batch.map(torch.zeros_like) == batch
