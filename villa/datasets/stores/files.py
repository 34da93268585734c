"""A user's own region features: one ``.npz`` or ``.safetensors`` file an image."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from villa.datasets.stores.base import RegionStore, Source
from villa.errors import DataError
from villa.plugins import one_line

#: Names of the boxes in a file; the second is that of the released feature files.
BOX_NAMES = ("boxes", "norm_bb")
SUFFIXES = (".npz", ".safetensors")


class FileStore(RegionStore):
    """Feature files with ``features [R, D]`` and ``boxes`` (or ``norm_bb``) ``[R, 4 | 6 | 7]``, normalised.

    Args:
        sources: the files; at least one.

    Raises:
        DataError: a file is missing, or the first one cannot be used.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        super().__init__(sources)
        self.dim = _feature_shape(sources[0])[1]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Read a file.

        Raises:
            DataError: it cannot be read, or its arrays have wrong shapes or values.
        """
        source = self.sources[index]
        features, boxes = _read(source)
        _check(features, boxes, self.dim, source)
        return features, boxes.float()

    def regions(self, index: int) -> int:
        """Return the number of rows of a file's features, from its header."""
        return _feature_shape(self.sources[index])[0]

    def prepare(self, indices: Iterable[int]) -> None:
        """Check that the files exist."""
        for index in indices:
            self.sources[index].stat()


def _read(source: Source) -> tuple[Tensor, Tensor]:
    _check_suffix(source)
    try:
        if source.path.suffix == ".npz":
            with np.load(source.path, allow_pickle=False) as arrays:
                name = _box_name(set(arrays.keys()))
                return torch.from_numpy(arrays["features"]), torch.from_numpy(arrays[name])
        with safe_open(source.path, framework="pt") as tensors:
            return tensors.get_tensor("features"), tensors.get_tensor(_box_name(set(tensors.keys())))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
        raise _unreadable(source, error) from error


def _feature_shape(source: Source) -> tuple[int, int]:
    """Read the shape of ``features`` from a file's header."""
    _check_suffix(source)
    try:
        shape = _npz_shape(source.path) if source.path.suffix == ".npz" else _safetensors_shape(source.path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
        raise _unreadable(source, error) from error
    if len(shape) != 2:
        raise DataError(f"{source.named_by}: features in '{source.path}' have shape {shape}; it must be [R, D]")
    return shape[0], shape[1]


def _npz_shape(path: Path) -> tuple[int, ...]:
    with zipfile.ZipFile(path) as archive, archive.open("features.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape: tuple[int, ...] = read(file)[0]
        return shape


def _safetensors_shape(path: Path) -> tuple[int, ...]:
    with safe_open(path, framework="pt") as tensors:
        return tuple(tensors.get_slice("features").get_shape())


def _check(features: Tensor, boxes: Tensor, dim: int, source: Source) -> None:
    """Refuse features that a model would silently misread."""
    problem = None
    if features.dim() != 2 or not features.is_floating_point() or len(features) == 0:
        problem = f"features are {features.dtype} {list(features.shape)}; they must be floats [R, D] with R >= 1"
    elif features.shape[1] != dim:
        problem = f"features are {features.shape[1]} wide, those of the other files {dim}: another detector made them"
    elif boxes.dim() != 2 or boxes.shape[1] not in (4, 6, 7) or len(boxes) != len(features):
        problem = f"boxes have shape {list(boxes.shape)}; they must be [{len(features)}, 4], 6 or 7 wide"
    elif not (boxes.isfinite().all() and features.isfinite().all()):
        problem = "features or boxes hold NaN or infinite values"
    elif boxes.min() < -0.01 or boxes.max() > 1.01:
        problem = "boxes are not within [0, 1]; divide them by the image's width and height"
    if problem:
        raise DataError(f"{source.named_by}: '{source.path}': {problem}")


def _check_suffix(source: Source) -> None:
    source.stat()
    if source.path.suffix not in SUFFIXES:
        raise DataError(f"{source.named_by}: '{source.path}' is not a feature file; give {' or '.join(SUFFIXES)}")


def _box_name(names: set[str]) -> str:
    for name in BOX_NAMES:
        if name in names:
            return name
    raise KeyError(f"no {' or '.join(BOX_NAMES)} among {sorted(names)}")


def _unreadable(source: Source, error: Exception) -> DataError:
    return DataError(f"{source.named_by}: cannot read features from '{source.path}': {one_line(error)}")
