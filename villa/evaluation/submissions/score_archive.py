"""An npz file of retrieval scores, read without trusting what it says about itself."""

from __future__ import annotations

import math
import sys
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from villa.engine.progress import track
from villa.errors import DataError
from villa.plugins import one_line

SCORES, TEXTS, IMAGES = "scores", "text_ids", "image_ids"

#: Bytes of ids that are read at most; COCO's 25,000 texts have some megabytes.
_LARGEST_NAMES = 1 << 26
_ALLOWED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what numpy writes


class ScoreArchive:
    """The arrays ``scores``, ``text_ids`` and ``image_ids`` of an npz file; a context manager.

    Scores are read row by row, so that neither a large file nor a false size in a small one needs memory.

    Args:
        path: the file.

    Raises:
        DataError: on entering or reading: the file is missing or damaged, or its arrays are of another form.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> ScoreArchive:
        with self._explained():
            self._zip = zipfile.ZipFile(self.path)
        try:
            self._check_members()
        except DataError:
            self._zip.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()

    def names(self, name: str) -> list[str]:
        """Return a unicode array ``[n]`` as a list."""
        with self._explained(), self._zip.open(f"{name}.npy") as file:
            shape, dtype = self._header(file, name)
            size = math.prod(shape) * dtype.itemsize
            if dtype.kind != "U" or len(shape) != 1 or not dtype.itemsize:
                raise DataError(f"{self.path}: {name} is {dtype} {list(shape)}; it must be a list of texts")
            if not 0 <= size <= _LARGEST_NAMES:
                raise DataError(f"{self.path}: {name} has {size:,} bytes; 0 to {_LARGEST_NAMES:,} are allowed")
            data = self._read(file, size, name)
            if file.read(1):
                raise DataError(f"{self.path}: {name} goes on after its end; write the file again")
            codes = np.frombuffer(data, np.dtype(np.uint32).newbyteorder(dtype.byteorder))
            if codes.max(initial=0) > sys.maxunicode:  # numpy would fail on it
                raise DataError(f"{self.path}: {name} holds what is no character; write the file again")
            return [str(text) for text in np.frombuffer(data, dtype)]

    def rows(self, texts: int, images: int) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the scores ``[images]`` of each text.

        Raises:
            DataError: the scores are not float32 ``[texts, images]``.
        """
        with self._explained(), self._zip.open(f"{SCORES}.npy") as file:
            shape, dtype = self._header(file, SCORES)
            if dtype != np.dtype("<f4") or shape != (texts, images):
                wanted = f"float32 [{texts}, {images}], as {TEXTS} and {IMAGES} are long"
                raise DataError(f"{self.path}: {SCORES} is {dtype} {list(shape)}; it must be {wanted}")
            for _ in track(range(texts), "validate"):
                yield np.frombuffer(self._read(file, 4 * images, SCORES), dtype)
            if file.read(1):
                raise DataError(f"{self.path}: {SCORES} goes on after its end; write the file again")

    def _check_members(self) -> None:
        names = sorted(info.filename for info in self._zip.infolist())
        if names != sorted(f"{name}.npy" for name in (SCORES, TEXTS, IMAGES)):
            found = ", ".join(map(repr, names))[:80] or "nothing"
            raise DataError(f"{self.path} holds {found}; it must hold {SCORES}, {TEXTS} and {IMAGES}")
        if any(info.compress_type not in _ALLOWED for info in self._zip.infolist()):
            raise DataError(f"{self.path} is compressed in a way that numpy does not use; write it with numpy.savez")

    def _header(self, file: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        if np.lib.format.read_magic(file) != (1, 0):
            raise DataError(f"{self.path}: {name} is in another version of the npy format than 1.0; use numpy.savez")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        if by_columns and len(shape) > 1:
            raise DataError(f"{self.path}: {name} is in Fortran's order; write numpy.ascontiguousarray of it")
        return shape, dtype

    def _read(self, file: IO[bytes], size: int, name: str) -> bytes:
        data = file.read(size)
        if len(data) != size:
            raise DataError(f"{self.path}: {name} ends too early; write the file again")
        return data

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what zipfile and numpy raise on files that are missing, damaged or made to harm into DataError."""
        try:
            yield
        except FileNotFoundError as error:
            raise DataError(f"cannot read '{self.path}' ({error.strerror}); mend the path") from error
        except (
            OSError,
            ValueError,
            TypeError,
            EOFError,
            RuntimeError,  # encrypted members; NotImplementedError and RecursionError are kinds of it
            OverflowError,
            SyntaxError,
            tokenize.TokenError,  # of numpy's second try to understand a header, as is the warning
            UserWarning,
            MemoryError,
            zlib.error,
            zipfile.BadZipFile,
        ) as error:
            raise DataError(f"'{self.path}' is not an npz file that can be read ({one_line(error)})") from error
