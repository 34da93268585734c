"""Selection of an image's detections, and the names of region feature databases that derive from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from villa.datasets.boxes import check_confidences
from villa.datasets.uniter.packed_arrays import Array
from villa.errors import ConfigError

#: Positions of the selected rows.
Rows = slice | npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class BoxSelection:
    """Selection of an image's detections: by confidence, within bounds, or a fixed number.

    Attributes:
        threshold: confidence above which a detection counts.
        max_boxes: largest number of boxes per image.
        min_boxes: smallest number of boxes per image, reached with less confident detections.
        fixed: number of leading boxes to use instead (ground truth: more than exist).
        compressed: whether the values are compressed ``.npz`` archives.
    """

    threshold: float = 0.2
    max_boxes: int = 100
    min_boxes: int = 10
    fixed: int | None = None
    compressed: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.min_boxes <= self.max_boxes:
            bounds = f"min_boxes {self.min_boxes} and max_boxes {self.max_boxes}"
            raise ConfigError(f"{bounds} do not fit; give 1 <= min_boxes <= max_boxes")
        if self.fixed is not None and self.fixed < 1:
            raise ConfigError(f"a fixed number of {self.fixed} boxes is too small; give at least 1")

    def folder(self) -> str:
        """Return the name of the environment's folder."""
        return self._name("feat") + ("_compressed" if self.compressed else "")

    def counts_file(self) -> str | None:
        """Return the name of the file with every image's number of boxes; None if that is fixed."""
        return f"{self._name('nbb')}.json" if self.fixed is None else None

    def count(self, confidences: Array) -> int:
        """Return how many of an image's boxes are selected, given the confidences ``[R]`` of all."""
        enough = int((confidences > self.threshold).sum()) if self.fixed is None else self.fixed
        wanted = min(max(enough, self.min_boxes), self.max_boxes) if self.fixed is None else enough
        return min(wanted, len(confidences))

    def rows(self, confidences: Array) -> Rows:
        """Select an image's boxes, given the confidences ``[R]`` of all.

        A fixed number selects the leading boxes, because the order of annotated boxes matters.

        Raises:
            ValueError: a confidence is outside [0, 1].
        """
        count = self.count(confidences)
        if self.fixed is not None:
            return slice(count)
        check_confidences(confidences)
        return surest(confidences, count)

    def check_chosen(self, used: Array, stored: Array) -> None:
        """Check that the most confident detections were selected.

        Args:
            used: confidences ``[R]`` of the selected boxes.
            stored: confidences of all stored boxes.

        Raises:
            ValueError: a box that was left out is more confident than a selected one.
        """
        check_confidences(stored)
        if _are_descending(used):
            return
        # Boxes below the threshold only fill up to min_boxes. Stored confidences are rounded to float16.
        filled = len(used) > self.min_boxes and bool((used <= self.threshold * (1 - 2**-10)).any())
        if filled or np.sort(used)[0] < np.sort(stored)[-len(used)]:
            raise ValueError(
                "its confidences do not fall, and less sure boxes were kept instead of surer ones; make it again"
            )

    def _name(self, prefix: str) -> str:
        if self.fixed is not None:
            return f"{prefix}_numbb{self.fixed}"
        return f"{prefix}_th{self.threshold}_max{self.max_boxes}_min{self.min_boxes}"


def surest(confidences: Array, count: int) -> Rows:
    """Return the positions of the ``count`` most confident boxes; the leading ones if confidences are descending."""
    if _are_descending(confidences):
        return slice(count)
    return np.argsort(-confidences.astype(np.float64), kind="stable")[:count]


def _are_descending(confidences: Array) -> bool:
    return bool((confidences[1:] <= confidences[:-1]).all())
