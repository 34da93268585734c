"""Arrays of an ``.npz`` file on the disk: nothing is unpickled, and a size is checked before memory is taken for it."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from villa.datasets.stores.packed_arrays import MAX_ARRAY_BYTES
from villa.files import regular_file

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class NpzFile:
    """An ``.npz`` file opened for reading, as a context manager.

    Reading a damaged file raises whatever zipfile, zlib and numpy's parser come across; callers turn that into a
    message (``villa.datasets.stores.base.reading``).

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
            ValueError: the array is not one of numbers, or claims another size than it has.
        """
        with self._open(name) as file:
            return self._header(name, file)[0]

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """Read an array.

        Raises:
            ValueError: see ``shape``; or it is cut off.
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
