"""Features on disk: one memory-mapped array that is filled chunk by chunk, survives kills and mends itself."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from villa.errors import reading
from villa.files import open_own, write_json

logger = logging.getLogger(__name__)

#: Rows that are written (and, by a kill, lost) at a time.
CHUNK = 64
FEATURES_FILE, INDEX_FILE = "features.npy", "index.json"
FORMAT = 1


class FeatureCache:
    """An array ``[N, R, D]`` of float16 in ``features.npy``, described by ``index.json``.

    A chunk is complete when the index holds its checksum. The index also holds the array's size and modification time:
    if they differ (after a kill, a copy or damage), all checksums are compared, and chunks that do not match count as
    missing. Only one process may write at a time: the caller holds a lock.

    Args:
        folder: the cache's own folder.
        shape: N, R, D.
        description: description of the features; an index with another one is discarded.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], description: Mapping[str, Any]) -> None:
        self.folder = folder
        self.shape = shape
        self._description = {"format": FORMAT, "shape": list(shape), **description}
        self._array: Tensor | None = None
        self._checksums: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}  # a memory map would be pickled as a copy

    @property
    def array(self) -> Tensor:
        """The array ``[N, R, D]`` float16, mapped into memory on first use in each process."""
        if self._array is None:
            # Copy-on-write leaves the file unchanged; torch warns about read-only memory.
            self._array = torch.from_numpy(np.load(self._features, mmap_mode="c", allow_pickle=False))
        return self._array

    @property
    def _features(self) -> Path:
        return self.folder / FEATURES_FILE

    @property
    def _index(self) -> Path:
        return self.folder / INDEX_FILE

    def rows(self, chunk: int) -> range:
        """Return the rows of a chunk."""
        return range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.shape[0]))

    def missing(self, chunks: list[int]) -> list[int]:
        """Check the cache, and return the chunks that it lacks."""
        index = self._read_index()
        if index is None or not self._features_fit():
            self._start()
        else:
            self._checksums = dict(index["checksums"])
            if index["stamp"] != self._stamp():
                self._verify()
        return [chunk for chunk in chunks if str(chunk) not in self._checksums]

    def write(self, chunk: int, features: npt.NDArray[np.float16]) -> None:
        """Store a chunk ``[rows, R, D]``, and record it once it is on disk."""
        rows = self.rows(chunk)
        data = np.ascontiguousarray(features).tobytes()
        # Plain writes, because a full disk kills a process that writes to a memory map.
        with open_own(self._features, "r+b") as file:
            file.seek(self._offset(file) + rows.start * self._row_bytes)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._checksums[str(chunk)] = zlib.crc32(data)
        self._write_index()

    @property
    def _row_bytes(self) -> int:
        return 2 * self.shape[1] * self.shape[2]

    def _read_index(self) -> dict[str, Any] | None:
        """Return the index, or None if there is none that fits."""
        try:
            index = json.loads(self._index.read_text(encoding="utf-8"))
            fits = all(index[key] == value for key, value in self._description.items())
            return index if fits and {"checksums", "stamp"} <= index.keys() else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            logger.warning("%s is damaged; its features are extracted again", self._index)
            return None

    def _features_fit(self) -> bool:
        try:
            array = np.load(self._features, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            logger.warning("%s is damaged; it is extracted again", self._features)
            return False
        return bool(array.shape == self.shape and array.dtype == np.float16)

    def _start(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        header = {"descr": "<f2", "fortran_order": False, "shape": self.shape}
        with open_own(self._features, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + self.shape[0] * self._row_bytes)
        self._checksums = {}
        self._write_index()

    def _verify(self) -> None:
        """Discard chunks that differ from their checksum."""
        damaged = self._damaged()
        for chunk in damaged:
            del self._checksums[chunk]
        if damaged:
            logger.warning("%s: %d damaged chunks are extracted again", self._features, len(damaged))
        self._write_index()

    def _damaged(self) -> list[str]:
        damaged = []
        with self._features.open("rb") as file:
            offset = self._offset(file)
            for chunk, checksum in self._checksums.items():
                rows = self.rows(int(chunk))
                file.seek(offset + rows.start * self._row_bytes)
                if zlib.crc32(file.read(len(rows) * self._row_bytes)) != checksum:
                    damaged.append(chunk)
        return damaged

    def _offset(self, file: IO[bytes]) -> int:
        file.seek(0)
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        return file.tell()

    def _stamp(self) -> list[int]:
        stat = self._features.stat()
        return [stat.st_size, stat.st_mtime_ns]

    def _write_index(self) -> None:
        write_json(self._index, {**self._description, "checksums": self._checksums, "stamp": self._stamp()})


def damaged_chunks(folder: Path) -> tuple[int, int]:
    """Compare a cache with its checksums without changing it.

    Returns:
        Numbers of damaged chunks and of all chunks.

    Raises:
        DataError: its index cannot be read.
    """
    with reading(f"cannot read the feature cache '{folder}'", "remove the folder"):
        index = json.loads((folder / INDEX_FILE).read_bytes())
        cache = FeatureCache(folder, tuple(index["shape"]), {})
        cache._checksums = dict(index["checksums"])
        return len(cache._damaged()), len(cache._checksums)
