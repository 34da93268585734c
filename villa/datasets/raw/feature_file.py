"""Reading a ``.npz`` file of region features; imports little, for the processes that do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt

from villa.datasets.stores.box_selection import BoxSelection
from villa.datasets.stores.npz import NpzFile
from villa.errors import DataError, reading

Arrays = dict[str, npt.NDArray[Any]]

_NEEDED = ("features", "norm_bb", "conf")
_OPTIONAL = "soft_labels"


def read_features(path: Path, boxes: BoxSelection) -> Arrays:
    """Read the arrays of a feature file, cut to the boxes that are kept, by falling confidence.

    Raises:
        DataError: it cannot be read or lacks an array.
    """
    with reading(f"cannot read features from '{path}'", "extract them again"), NpzFile(path) as archive:
        missing = [name for name in _NEEDED if name not in archive]
        if missing:
            raise DataError(f"'{path}' lacks {missing[0]}; a feature file holds {', '.join(_NEEDED)}")
        arrays = {name: archive[name] for name in (*_NEEDED, _OPTIONAL) if name in archive}
    if arrays["conf"].ndim != 1:
        raise DataError(f"'{path}': conf has shape {list(arrays['conf'].shape)}; it must be [R]")
    if len({len(array) if array.ndim else -1 for array in arrays.values()}) == 1:  # else the writer names the culprit
        try:
            rows = boxes.rows(arrays["conf"])
        except ValueError as error:
            raise DataError(f"'{path}': {error}") from error
        arrays = {name: array[rows] for name, array in arrays.items()}
    return arrays


def read_named(folder: Path, boxes: BoxSelection, name: str) -> tuple[str, Arrays]:
    """Return the name of a file of a folder with its arrays; see ``read_features``."""
    return name, read_features(folder / name, boxes)
