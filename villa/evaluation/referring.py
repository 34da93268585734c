"""Accuracy of referring expressions: does the chosen box overlap the one that is meant?"""

from __future__ import annotations

from typing import ClassVar

import torch

from villa.batch import Batch
from villa.errors import DataError
from villa.evaluation.metrics import MeanScore
from villa.evaluation.references import Box, RegionReference
from villa.models.base import ModelOutput
from villa.registry import register_metric

#: A chosen box is right when its intersection over union with the box meant is above this.
RIGHT_ABOVE = 0.5


def box_iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes x, y, w, h in pixels.

    As in the released code a box ends at x + w - 1, and both pixels count in the intersection's width.
    """
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    shared = width * height if width > 1 and height > 1 else 0.0
    return shared / (first[2] * first[3] + second[2] * second[3] - shared)


@register_metric("referring")
class ReferringAccuracy(MeanScore):
    """Share of expressions whose highest-scored region has an IoU above 0.5 with the box meant: logits ``[B, R]``."""

    name: ClassVar[str] = "referring"

    def update(self, output: ModelOutput, batch: Batch) -> None:
        """Add the batch's hits."""
        references = batch.references or [None]
        if not all(isinstance(r, RegionReference) and r.target is not None for r in references):
            raise DataError("metric 'referring' needs expressions with the box meant; evaluate a split that has them")
        chosen = output.logits.argmax(1).tolist()
        hits = [box_iou(r.boxes[i], r.target) > RIGHT_ABOVE for r, i in zip(references, chosen, strict=True)]
        self.add(torch.tensor(hits))
