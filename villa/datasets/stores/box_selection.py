"""Which of an image's detections are used, and how the databases of region features are named after that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from villa.datasets.stores.packed_arrays import Array
from villa.errors import ConfigError, DataError
from villa.files import read_json


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

    def _name(self, prefix: str) -> str:
        if self.fixed is not None:
            return f"{prefix}_numbb{self.fixed}"
        return f"{prefix}_th{self.threshold}_max{self.max_boxes}_min{self.min_boxes}"


def read_counts(path: Path) -> dict[str, int]:
    """Read the number of boxes of every image.

    Raises:
        DataError: the file cannot be read or holds something else.
    """
    counts = read_json(path, "numbers of boxes", "copy it again")
    if not isinstance(counts, dict):
        raise DataError(f"'{path}' holds a JSON {type(counts).__name__}; an object {{image: boxes}} is needed")
    wrong = next((name for name, count in counts.items() if type(count) is not int or count < 1), None)
    if wrong is not None:
        raise DataError(f"'{path}': '{wrong}' has {counts[wrong]!r:.40} boxes; a number of at least 1 is needed")
    return counts
