"""A user's own region features: one ``.npz`` or ``.safetensors`` file per image."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from villa.datasets.boxes import WIDTHS, check_boxes, check_confidences, check_features, sampled
from villa.datasets.signatures import check_signatures, read_maker, read_signature
from villa.datasets.stores import ImageSource, RegionStore
from villa.datasets.uniter.packed_arrays import MAX_ARRAY_BYTES
from villa.errors import DataError, reading
from villa.files import regular_file

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class NpzFile:
    """An ``.npz`` file opened for reading, as a context manager.

    A damaged file raises exceptions of zipfile, zlib and numpy, which callers turn into a message
    (``villa.datasets.stores.reading``).

    Args:
        path: the file.

    Attributes:
        names: the arrays in it.
    """

    def __init__(self, path: Path) -> None:
        regular_file(path)
        self._archive = zipfile.ZipFile(path)
        self.names = {name.removesuffix(".npy") for name in self._archive.namelist()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._archive.close()

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Read the shape of an array from its header.

        Raises:
            ValueError: the array is not numeric, or its header contradicts its size.
        """
        with self._open(name) as file:
            return self._header(name, file)[0]

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """Read an array.

        Raises:
            ValueError: see ``shape``; or the array is truncated.
        """
        with self._open(name) as file:
            shape, columns_first, dtype = self._header(name, file)
            array = np.empty(shape[::-1] if columns_first else shape, dtype)
            if array.nbytes and file.readinto(array.data.cast("B")) != array.nbytes:  # type: ignore[attr-defined]
                raise ValueError(f"'{name}' is cut off")
        return array.T if columns_first else array

    def _open(self, name: str) -> IO[bytes]:
        return self._archive.open(f"{name}.npy")

    def _header(self, name: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        size = self._archive.getinfo(f"{name}.npy").file_size
        if size > MAX_ARRAY_BYTES:
            raise ValueError(f"'{name}' claims {size:,} bytes; an image's array has {MAX_ARRAY_BYTES:,} at most")
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"'{name}' has a version that arrays of numbers never have: {version}")
        shape, columns_first, dtype = _HEADERS[version](file)
        if dtype.kind not in "fiub":
            raise ValueError(f"'{name}' is an array of {dtype}, not of numbers")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size - file.tell():
            raise ValueError(f"'{name}' claims the shape {list(shape)}, which its {size:,} bytes do not hold")
        return shape, columns_first, dtype


#: Array names of the boxes; the second is that of the released feature files.
BOX_NAMES = ("boxes", "norm_bb")
SUFFIXES = (".npz", ".safetensors")


class FileStore(RegionStore):
    """Feature files with ``features [R, D]`` and ``boxes`` (or ``norm_bb``) ``[R, 4 | 6 | 7]``, normalised.

    Args:
        sources: at least one file.
        allow_empty_boxes: accept boxes without area.

    Attributes:
        extractor: signature of what made the features of the first file, or of all that are prepared; None if it is
            not noted.
        maker: how that extractor was built, as far as it is noted.

    Raises:
        DataError: a file is missing, or the first one cannot be used.
    """

    def __init__(self, sources: Sequence[ImageSource], *, allow_empty_boxes: bool = False) -> None:
        super().__init__(sources)
        self._allow_empty = allow_empty_boxes
        self.dim = _feature_shape(sources[0])[1]
        self.extractor = read_signature(sources[0].path.parent)
        self.maker = read_maker(sources[0].path.parent)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the features and boxes of a file.

        Raises:
            DataError: the file cannot be read, or its arrays have wrong shapes or values.
        """
        source = self.sources[index]
        features, boxes = _read(source)
        try:
            _check_shapes(features, boxes, self.dim)
            check_features(features)
            boxes = boxes.float()
            check_boxes(boxes.numpy(), allow_empty=self._allow_empty)
        except ValueError as error:
            raise DataError(f"{source.place}'{source.path}': {error}") from error
        return features, boxes

    def check(self, index: int) -> None:
        """Check what is read from a file, and the confidences ``conf [R]`` that released feature files have.

        Raises:
            DataError: as for reading it; or a confidence is outside [0, 1].
        """
        source, regions = self.sources[index], len(self[index][0])
        with _reading(source):
            sure = _array(source.path, "conf")
        if sure is None:
            return
        try:
            if sure.size != regions:
                raise ValueError(f"conf has the shape {list(sure.shape)}; it must be [{regions}]")
            check_confidences(sure.reshape(-1))
        except ValueError as error:
            raise DataError(f"{source.place}'{source.path}': {error}") from error

    def regions(self, index: int) -> int:
        """Return the number of regions of a file, from its header."""
        return _feature_shape(self.sources[index])[0]

    def prepare(self, indices: Iterable[int]) -> None:
        """Check that the files exist and are of one extractor, and read a sample of them."""
        wanted, folders = list(indices), {self.sources[0].path.parent}
        for index in wanted:
            source = self.sources[index]
            source.stat()
            folders.add(source.path.parent)
        self.extractor = check_signatures((folder, read_signature(folder)) for folder in sorted(folders))
        for index in sampled(wanted):
            self[index]


def _read(source: ImageSource) -> tuple[Tensor, Tensor]:
    with _reading(source):
        if source.path.suffix == ".npz":
            with NpzFile(source.path) as arrays:
                boxes = arrays[_box_name(arrays.names)]
                return torch.from_numpy(arrays["features"]), torch.from_numpy(boxes)
        with safe_open(source.path, framework="pt") as tensors:
            name = _box_name(set(tensors.keys()))
            _check_size(tensors.get_slice("features").get_shape())
            _check_size(tensors.get_slice(name).get_shape())
            return tensors.get_tensor("features"), tensors.get_tensor(name)


def _array(path: Path, name: str) -> npt.NDArray[Any] | None:
    """Read an array by name, if the file has it."""
    if path.suffix == ".npz":
        with NpzFile(path) as arrays:
            return arrays[name] if name in arrays.names else None
    with safe_open(path, framework="pt") as tensors:
        if name not in tensors.keys():  # noqa: SIM118 (not a mapping)
            return None
        _check_size(tensors.get_slice(name).get_shape())
        found: npt.NDArray[Any] = tensors.get_tensor(name).float().numpy()
        return found


def _feature_shape(source: ImageSource) -> tuple[int, int]:
    """Read the shape of ``features`` from a file's header."""
    with _reading(source):
        shape = _npz_shape(source.path) if source.path.suffix == ".npz" else _safetensors_shape(source.path)
    if len(shape) != 2:
        raise DataError(f"{source.place}features in '{source.path}' have shape {shape}; it must be [R, D]")
    return shape[0], shape[1]


def _npz_shape(path: Path) -> tuple[int, ...]:
    with NpzFile(path) as arrays:
        return arrays.shape("features")


def _safetensors_shape(path: Path) -> tuple[int, ...]:
    with safe_open(path, framework="pt") as tensors:
        return tuple(tensors.get_slice("features").get_shape())


def _check_size(shape: Sequence[int]) -> None:
    """Refuse an array that would exhaust memory, as a sparse file may claim one."""
    if math.prod(shape) > MAX_ARRAY_BYTES // 2:
        raise ValueError(f"an array of shape {list(shape)} is larger than an image's can be")


def _check_shapes(features: Tensor, boxes: Tensor, dim: int) -> None:
    """Refuse features and boxes whose shapes do not fit each other or the other files.

    Raises:
        ValueError: saying what is wrong.
    """
    if features.dim() != 2 or not features.is_floating_point() or len(features) == 0:
        form = f"{features.dtype} {list(features.shape)}"
        raise ValueError(f"features are {form}; they must be floats [R, D] with R >= 1")
    if features.shape[1] != dim:
        found = features.shape[1]
        raise ValueError(f"features are {found} wide, those of the other files {dim}: another detector made them")
    if boxes.dim() != 2 or boxes.shape[1] not in WIDTHS or len(boxes) != len(features):
        raise ValueError(f"boxes have shape {list(boxes.shape)}; they must be [{len(features)}, 4], 6 or 7 wide")


def _check_suffix(source: ImageSource) -> None:
    source.stat()
    if source.path.suffix not in SUFFIXES:
        raise DataError(f"{source.place}'{source.path}' is not a feature file; give {' or '.join(SUFFIXES)}")


def _box_name(names: set[str]) -> str:
    for name in BOX_NAMES:
        if name in names:
            return name
    raise KeyError(f"no {' or '.join(BOX_NAMES)} among {sorted(names)}")


def _reading(source: ImageSource) -> AbstractContextManager[None]:
    _check_suffix(source)
    return reading(f"{source.place}cannot read features from '{source.path}'", "extract them again")
