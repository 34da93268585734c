"""Which of an image's detections are used, and how the databases of region features are named after that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from villa.datasets.boxes import check_confidences
from villa.datasets.uniter.packed_arrays import Array
from villa.errors import ConfigError

#: Places of the rows that are used.
Rows = slice | npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class BoxSelection:
    """Which of an image's detections are used: those of enough confidence within bounds, or a fixed number.

    Attributes:
        threshold: confidence above which a detection counts.
        max_boxes: largest number of boxes an image.
        min_boxes: smallest number: filled up with detections of less confidence.
        fixed: the first so many boxes of every image instead (ground truth: more than there are).
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
        """Name of the environment's folder."""
        return self._name("feat") + ("_compressed" if self.compressed else "")

    def counts_file(self) -> str | None:
        """Name of the file with the number of boxes of every image; None where it is fixed."""
        return f"{self._name('nbb')}.json" if self.fixed is None else None

    def count(self, confidences: Array) -> int:
        """Return how many of an image's boxes are used, given the confidences ``[R]`` of all of them."""
        enough = int((confidences > self.threshold).sum()) if self.fixed is None else self.fixed
        wanted = min(max(enough, self.min_boxes), self.max_boxes) if self.fixed is None else enough
        return min(wanted, len(confidences))

    def rows(self, confidences: Array) -> Rows:
        """Return which of an image's boxes are used, given the confidences ``[R]`` of all of them.

        A fixed number takes the first ones: the places of annotated boxes have a meaning.

        Raises:
            ValueError: a confidence is outside of [0, 1].
        """
        count = self.count(confidences)
        if self.fixed is not None:
            return slice(count)
        check_confidences(confidences)
        return surest(confidences, count)

    def check_chosen(self, used: Array, stored: Array) -> None:
        """Refuse detections that were chosen by a wrong order: less sure ones instead of surer ones.

        Args:
            used: the confidences ``[R]`` of the boxes that are used.
            stored: those of all boxes that are stored.

        Raises:
            ValueError: a box was left out that is surer than one that is used.
        """
        check_confidences(stored)
        if _fall(used):
            return
        # A box below the threshold is used to reach min_boxes only. Stored confidences are rounded to float16.
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
    """Return the places of the ``count`` boxes of most confidence; where confidences fall, these are the first."""
    if _fall(confidences):
        return slice(count)
    return np.argsort(-confidences.astype(np.float64), kind="stable")[:count]


def _fall(confidences: Array) -> bool:
    return bool((confidences[1:] <= confidences[:-1]).all())
