"""Referring expressions on the released databases."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from database_tasks import assert_same_batch, open_task
from golden_utils import load, to_batch

from villa.errors import ConfigError, DataError
from villa.models.packing import Packing
from villa.models.rows import RowLayout


@pytest.fixture
def referring(official_db: Path) -> Any:
    return open_task("referring", official_db)


def assert_rows(batch: Any, golden: dict[str, Any]) -> None:
    rows = RowLayout().rows(batch)
    packing = Packing.of(rows)
    assert torch.equal(batch.region_mask, golden["obj_masks"] == 0)
    real = golden["attn_masks"].bool()
    assert torch.equal(packing.mask, real)
    order = packing.origin.places.view(real.shape) % packing.origin.width
    assert torch.equal(order[real], golden["gather_index"][real])
    assert rows.text_mask.sum(dim=1).tolist() == golden["txt_lens"]


def test_a_training_batch_is_that_of_the_release(referring: Any) -> None:
    split, golden = referring.split("train"), load("re", "batch")["batch"]
    batch = referring.collate([split[index] for index in range(0, 24, 4)])
    targets = golden["targets"].flatten()
    assert_same_batch(batch, to_batch(golden | {"targets": targets}, "vqa"))
    assert_rows(batch, golden)


def test_an_evaluation_batch_is_that_of_the_release(referring: Any) -> None:
    split, golden = referring.split("val"), load("re", "batch")["eval_batch"]
    batch = referring.collate([split[split.ids.index(id)] for id in golden["sent_ids"]])
    assert_same_batch(batch, to_batch(golden | {"targets": None}, "vqa"))
    assert_rows(batch, golden)
    for reference, meant, boxes in zip(batch.references, golden["tgt_box"], golden["obj_boxes"], strict=True):
        assert list(reference.target) == meant.tolist()
        torch.testing.assert_close(torch.tensor(reference.boxes), boxes, rtol=0, atol=1e-4)


def test_evaluation_may_be_on_ground_truth_boxes(official_db: Path) -> None:
    task = open_task("referring", official_db, val_boxes="ground_truth", val_images=["img_db/re_coco_gt"])
    split = task.split("val")
    for index in range(len(split)):
        assert len(split[index].reference.boxes) == len(split._images[split._image_of[split.ids[index]]]["ann_ids"])


def test_the_target_is_the_annotation_meant(referring: Any) -> None:
    split = referring.split("train")
    fields = split.fields(0)
    annotations = split._images[fields["image_id"]]["ann_ids"]
    for number, annotation in enumerate(annotations):
        assert split.example(0, fields | {"ann_id": annotation}).target == number
    with pytest.raises(DataError, match="example '0' has the annotation 99999999, which is none of its image's"):
        split.example(0, fields | {"ann_id": 99999999})


def test_training_on_other_boxes_than_the_annotated_ones_is_refused(referring: Any) -> None:
    split = referring.split("train")
    image = split._images[split._image_of[split.ids[0]]]
    image["ann_ids"] = image["ann_ids"][:-1]
    with pytest.raises(DataError, match=r"annotated boxes, but its image \d regions; train on ground-truth boxes"):
        split[0]


def test_training_on_detected_boxes_is_refused(official_db: Path) -> None:
    task = open_task("referring", official_db, train_images=["img_db/re_coco_det"])
    with pytest.raises(DataError, match=r"re_coco_det' has no feat_numbb100 \(present: feat_th0.2_max100_min10\)"):
        task.split("train")


@pytest.mark.parametrize("bbox", [[1, 2, 3], "box", [1, 2, 3, None], 4])
def test_a_box_of_another_form_is_refused(referring: Any, bbox: Any) -> None:
    split = referring.split("val")
    with pytest.raises(DataError, match="it must be x, y, width, height in pixels"):
        split.example(0, {"input_ids": [300], "bbox": bbox})


def test_a_split_without_boxes_meant_has_no_answers(referring: Any) -> None:
    split = referring.split("val")
    assert split.answered
    assert split.example(0, {"input_ids": [300]}).reference.target is None


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("refs.json", lambda rows: {"refs": rows}, "refs.json' must be a list of objects"),
        ("refs.json", lambda rows: [*rows, 3], "refs.json' must be a list of objects"),
        ("refs.json", lambda rows: [rows[0] | {"image_id": "x"}, *rows[1:]], "image_id of entry 0 is 'x', not of type"),
        ("images.json", lambda rows: [{"id": 1}], "ann_ids of entry 0 is None, not of type list"),
        ("images.json", lambda rows: [], "example '0' has no entry in refs.json, or its image none in images.json"),
        ("refs.json", lambda rows: rows[1:], "example '0' has no entry in refs.json"),
    ],
)
def test_tables_of_another_form_are_refused(
    official_db: Path, tmp_path: Path, file: str, change: Any, message: str
) -> None:
    copy = tmp_path / "refcoco_train.db"
    shutil.copytree(official_db / "txt_db" / "refcoco_train.db", copy)
    (copy / file).write_text(json.dumps(change(json.loads((copy / file).read_text()))))
    with pytest.raises(DataError, match=message) as raised:
        open_task("referring", official_db, train_text=[str(copy)]).split("train")
    assert str(copy) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_options_that_make_no_sense_are_refused(official_db: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset.ground_truth_boxes=0 is too small"):
        open_task("referring", official_db, ground_truth_boxes=0)


def test_decoding_gives_the_box_in_pixels(referring: Any) -> None:
    batch = referring.collate([referring.split("val")[0]])
    logits = torch.zeros(1, batch.features.shape[1])
    logits[0, 3] = 50.0
    decoded = referring.decode(logits, batch)[0]
    assert decoded == {"answer": 3, "score": 1.0, "box": list(batch.references[0].boxes[3])}
