"""Referring expressions on the released databases (RefCOCO, RefCOCO+, RefCOCOg): which region does a text mean?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from villa.batch import Batch
from villa.config.variants import Overlay
from villa.datasets.base import DatasetConfig, Example, Split
from villa.datasets.paths import DatabasePaths
from villa.datasets.ragged import Integers, Ragged
from villa.datasets.synthetic.overlay import SMALL_REFERRING
from villa.datasets.uniter.box_selection import BoxSelection
from villa.datasets.uniter.database_split import DatabaseSplit, Images, Pair
from villa.datasets.uniter.databases import DatabaseConfig, DatabaseTask
from villa.datasets.uniter.image_lmdb import ImageStore
from villa.datasets.uniter.index import Names
from villa.errors import ConfigError, DataError
from villa.facts import RegionReference
from villa.json_values import is_number
from villa.registry import register_dataset

Regions = Literal["ground_truth", "detected"]
#: Image names by kind of regions, in the released databases.
_NAMES = {
    "ground_truth": "visual_grounding_coco_gt_{:012}.npz",
    "detected": "visual_grounding_det_coco_{:012}.npz",
}
#: Required keys of the tables, and the types of their values.
_KEYS: Mapping[str, Mapping[str, type]] = {
    "refs.json": {"sent_ids": list, "image_id": int},
    "images.json": {"id": int, "ann_ids": list, "width": int, "height": int},
}


@dataclass
class ReferringConfig(DatabaseConfig):
    """Options of referring expressions, besides those that tasks on databases share.

    Training is on ground-truth boxes. A few that COCO's annotators drew have no area: ``allow_empty_boxes`` is true.

    Attributes:
        ground_truth_boxes: number in the name of the databases of ground-truth boxes; all boxes stored are used.
        val_boxes: regions to choose from in validation: ``ground_truth`` or ``detected`` boxes.
        test_boxes: the same for the test.
    """

    OVERLAYS: ClassVar[tuple[Overlay, ...]] = SMALL_REFERRING

    name: str = "referring"
    ground_truth_boxes: int = 100
    val_boxes: Regions = "detected"
    test_boxes: Regions = "detected"
    allow_empty_boxes: bool = True

    def check(self) -> None:
        """Check that the options are consistent."""
        super().check()
        if self.ground_truth_boxes < 1:
            raise ConfigError(f"dataset.ground_truth_boxes={self.ground_truth_boxes} is too small; give at least 1")

    def boxes(self, split: str) -> Regions:
        """Return the kind of regions of a split."""
        return "ground_truth" if split == "train" else self.val_boxes if split == "val" else self.test_boxes


class ExpressionSplit(DatabaseSplit):
    """Expressions with the regions of their images.

    Arguments as for ``DatabaseSplit``, and ``kind`` of the regions.
    """

    def __init__(self, task: DatabaseTask, name: str, pair: Pair, rows: Integers, kind: Regions) -> None:
        self._pattern = _NAMES[kind]
        self._image_of = {
            str(sentence): ref["image_id"] for ref in self._table(pair, "refs.json") for sentence in ref["sent_ids"]
        }
        self._images = {image["id"]: image for image in self._table(pair, "images.json")}
        super().__init__(task, name, pair, rows)

    def example(self, index: int, fields: Mapping[str, Any]) -> Example:
        """Build an example: in training with the index of the target region, in evaluation with boxes in pixels."""
        words = self.words(self.field(fields, "input_ids", index), index=index)
        features, boxes = self.regions(index)
        if self.training:
            return Example(self.ids[index], words, None, features, boxes, self._target(index, fields, len(features)))
        return Example(self.ids[index], words, None, features, boxes, None, self._reference(index, fields, boxes))

    def find_images(self) -> Ragged:
        """Check that the images of all expressions exist and are described; return their rows."""
        asked = [self._image_of.get(id) for id in self.ids]
        unknown = next((index for index, image in enumerate(asked) if image not in self._images), None)
        if unknown is not None:
            raise self.unusable(unknown, "no entry in refs.json, or its image none in images.json")
        assert isinstance(self.pair.images, ImageStore)
        names = Names.of(list(map(self._pattern.format, asked)))
        rows = self.pair.images.find(names.column)
        self.pair.images.check_all(rows, lambda: names, self.pair.text.path)
        return Ragged(rows, np.arange(len(rows) + 1))

    @property
    def answered(self) -> bool:
        """Whether the target box is known."""
        example = self[0]
        return example.target is not None or (example.reference is not None and example.reference.target is not None)

    def _target(self, index: int, fields: Mapping[str, Any], regions: int) -> int:
        """Return the index of the target region; regions are in the order of the image's annotations."""
        annotations = self._images[self._image_of[self.ids[index]]]["ann_ids"]
        if len(annotations) != regions:
            raise self.unusable(
                index,
                f"{len(annotations)} annotated boxes, but its image {regions} regions; train on ground-truth boxes",
            )
        meant = self.field(fields, "ann_id", index)
        if meant not in annotations:
            raise self.unusable(index, f"the annotation {meant}, which is none of its image's")
        return int(annotations.index(meant))

    def _reference(self, index: int, fields: Mapping[str, Any], boxes: Tensor) -> RegionReference:
        image = self._images[self._image_of[self.ids[index]]]
        sides = torch.tensor([image["width"], image["height"], image["width"], image["height"]])
        pixels = (boxes[:, [0, 1, 4, 5]] * sides).tolist()
        meant = fields.get("bbox")
        if meant is not None and not (isinstance(meant, list) and len(meant) == 4 and all(map(is_number, meant))):
            raise self.unusable(index, f"the bbox {meant!r:.60}; it must be x, y, width, height in pixels")
        return RegionReference(None if meant is None else tuple(meant), [tuple(box) for box in pixels])

    @staticmethod
    def _table(pair: Pair, name: str) -> list[dict[str, Any]]:
        """Read a list of objects and check their required keys."""
        needed, table = _KEYS[name], pair.text.read_json(name)
        if not (isinstance(table, list) and all(isinstance(row, dict) for row in table)):
            raise DataError(f"'{pair.text.path / name}' must be a list of objects; copy it again")
        for number, row in enumerate(table):
            wrong = next((key for key, kind in needed.items() if not isinstance(row.get(key), kind)), None)
            if wrong is not None:
                given, kind = f"{row.get(wrong)!r:.40}", needed[wrong].__name__
                raise DataError(f"'{pair.text.path / name}': {wrong} of entry {number} is {given}, not of type {kind}")
        return table


@register_dataset("referring")
class Referring(DatabaseTask):
    """Referring expressions: select the region that a text refers to."""

    Config: ClassVar[type[DatasetConfig]] = ReferringConfig
    config: ReferringConfig

    def parts(self, name: str, pair: Pair) -> list[Split]:
        """Return the expressions of a split."""
        return [ExpressionSplit(self, name, pair, self.chosen(name, pair.text), self.config.boxes(name))]

    def open_images(self, paths: DatabasePaths) -> Images:
        """Open ground-truth boxes with their fixed number, or detected ones as usual."""
        if self.config.boxes(paths.split) == "detected":
            return super().open_images(paths)
        fixed = BoxSelection(fixed=self.config.ground_truth_boxes, compressed=self.config.compressed)
        return self.image_database(paths.images[0], fixed)

    def decode(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Return the index of the best region, its probability and its box x, y, w, h in pixels."""
        scores, regions = logits.float().softmax(-1).max(-1)
        references: list[RegionReference] = batch.references or []
        return [
            {"answer": region, "score": score, "box": list(reference.boxes[region])}
            for region, score, reference in zip(regions.tolist(), scores.tolist(), references, strict=True)
        ]
