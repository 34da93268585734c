"""NLVR2 on the released databases."""

from pathlib import Path
from typing import Any

import pytest
import torch
from database_tasks import assert_same_batch, open_task
from golden_utils import load, to_batch

from villa.errors import DataError
from villa.models.rows import RowLayout


@pytest.fixture
def nlvr2(official_db: Path) -> Any:
    return open_task("nlvr2", official_db)


def test_a_batch_and_its_rows_are_those_of_the_release(nlvr2: Any) -> None:
    split = nlvr2.split("train")
    batch = nlvr2.collate([split[index] for index in range(6)])
    golden = load("villa_nlvr2", "batch_forward")["batch"]
    assert_same_batch(batch, to_batch(golden, "nlvr2"))
    rows = RowLayout(images=2, typed_images=True).rows(batch)
    assert torch.equal(rows.input_ids, golden["input_ids"])
    assert torch.equal(rows.features, golden["img_feat"])
    # The released types are 0 where there is no region.
    assert torch.equal(rows.image_types.expand(12, 15) * rows.region_mask, golden["img_type_ids"])


def test_lengths_count_both_rows(nlvr2: Any) -> None:
    split = nlvr2.split("train")
    left, right = split[3].features
    assert split.lengths[3] == 2 * (len(split[3].input_ids) - 2) + len(left) + len(right)


@pytest.mark.parametrize("target", [2, -1, "True", None, [0], {"labels": [0], "scores": [1.0]}])
def test_a_target_that_is_not_0_or_1_is_refused(nlvr2: Any, target: Any) -> None:
    split = nlvr2.split("train")
    with pytest.raises(DataError, match=r"the target .*; it must be 0 or 1"):
        split.example(0, {"input_ids": [300], "target": target})


def test_texts_about_one_image_are_refused(official_db: Path) -> None:
    task = open_task("nlvr2", official_db, train_text=["txt_db/ve_train.db"], train_images=["img_db/flickr30k"])
    with pytest.raises(DataError, match=r"'.*ve_train.db' is not one of NLVR2: a text does not have two images"):
        task.split("train")


def test_decoding_says_true_or_false(nlvr2: Any) -> None:
    batch = nlvr2.collate([nlvr2.split("val")[0]])
    assert nlvr2.decode(torch.tensor([[0.0, 0.0]]), batch)[0]["score"] == 0.5
    assert nlvr2.decode(torch.tensor([[-1.0, 1.0]]), batch)[0]["answer"] == "True"
