"""Tasks on the small databases of the fixture ``official_db``, and their batches beside those of the release."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from villa.batch import Batch
from villa.datasets.uniter.databases import DatabaseTask
from villa.models.uniter.layers import box_geometry
from villa.registry import DATASETS

#: Text database to train on, to validate on, and the images of each.
DATABASES = {
    "vqa": ("vqa_tiny40", "vqa_devval", "coco_train2014", "coco_train2014"),
    "snli_ve": ("ve_train", "ve_dev", "flickr30k", "flickr30k"),
    "nlvr2": ("nlvr2_train", "nlvr2_dev", "nlvr2_train", "nlvr2_train"),
    "vcr": ("vcr_train", "vcr_val", *["vcr_gt_train;img_db/vcr_train"] * 2),
    "retrieval": ("itm_flickr30k_train", "itm_flickr30k_val", "flickr30k", "flickr30k"),
    "referring": ("refcoco_train", "refcoco_val", "re_coco_gt", "re_coco_det"),
}
#: Name, head, loss and metric that go with a data set.
HEADS = {
    "vqa": ("classification", "binary_cross_entropy", "soft_accuracy"),
    "snli_ve": ("classification", "binary_cross_entropy", "soft_accuracy"),
    "nlvr2": ("nlvr2_paired_attn", "cross_entropy", "accuracy"),
    "vcr": ("multiple_choice", "cross_entropy", "vcr"),
    "retrieval": ("ranking", "margin_ranking", "retrieval"),
    "referring": ("regions", "cross_entropy", "referring"),
}


def options(name: str, root: Path) -> dict[str, Any]:
    """Options of a task on the databases below ``root``; VQA has 3,129 answers as the release has."""
    train, val, train_images, val_images = DATABASES[name]
    given: dict[str, Any] = {"name": name, "root": str(root)}
    for split, text, images in (("train", train, train_images), ("val", val, val_images)):
        given |= {f"{split}_text": [f"txt_db/{text}.db"], f"{split}_images": [f"img_db/{images}"]}
    return given | ({"answers": "answers.json"} if name == "vqa" else {})


def open_task(name: str, root: Path, **changes: Any) -> Any:
    """Open a task on the databases below ``root``, with further options."""
    kind = DATASETS.get(name)
    assert issubclass(kind, DatabaseTask)
    return kind(kind.Config(**options(name, root) | changes))


def write_answers(path: Path, count: int) -> str:
    """Write a file of so many answers as the release has it; return its path."""
    path.write_text(json.dumps({f"answer{label}": label for label in range(count)}))
    return str(path)


def arguments(name: str, root: Path, output: Path, **changes: Any) -> list[str]:
    """Arguments of ``villa_run`` for two updates of a tiny UNITER, with further options."""
    head, loss, metric = HEADS[name]
    recipe: dict[str, Any] = {
        "model": "uniter",
        "model.head": head,
        "model.hidden_size": 16,
        "model.num_layers": 1,
        "model.num_heads": 2,
        "model.max_positions": 100,
        "loss": loss,
        "evaluation.metrics": [metric],
        "evaluation.monitor": metric,
        "batch.examples": 8,
        "training.updates": 2,
        "logging.tensorboard": "false",
        "logging.progress": "off",
        "logging.every": 1,
        "device": "cpu",
        "output_dir": output,
        "dataset": name,
        **{f"dataset.{key}": value for key, value in options(name, root).items() if key != "name"},
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return [f"{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in recipe.items()]


def assert_same_batch(mine: Batch, golden: Batch) -> None:
    """Equal in every bit; boxes as UNITER reads them, with their areas."""
    for field in fields(Batch):
        ours, theirs = getattr(mine, field.name), getattr(golden, field.name)
        if not isinstance(theirs, Tensor):
            continue
        assert ours is not None, field.name
        if field.name == "boxes":
            ours = box_geometry(ours)
        assert ours.dtype == theirs.dtype, field.name
        assert torch.equal(ours, theirs), field.name
