"""Lines of a file by number: only their offsets are held in memory, 8 bytes a line."""

from __future__ import annotations

import os
import weakref
from array import array
from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from villa.errors import DataError

#: Longest line, in bytes, so that a file without line ends does not fill the memory.
LONGEST_LINE = 1 << 26
#: Bytes that are read at a time in search of lines, and lines that are read together.
_BLOCK, _TOGETHER = 1 << 20, 256
#: Whether a byte is white space, as ``bytes.strip`` takes it.
_WHITE = np.array([not bytes([code]).strip() for code in range(256)])


class LineFile:
    """The lines of a file that are not blank.

    Lines are read when they are asked for, by offset: a file that is cut meanwhile is an error, not a crash. The object
    may travel to forked and spawned workers.

    Args:
        path: the file; UTF-8, with or without a byte-order mark.

    Raises:
        DataError: the file cannot be read, or a line is too long.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._name = path, str(path)
        self._file: int | None = None
        self._starts, self._end = array("q"), 0
        # Where blank lines were left out: the first record behind them, and their number so far.
        self._behind, self._blank = array("q", [0]), array("q", [0])
        try:
            if path.exists() and not (
                path.is_file() or path.is_dir()
            ):  # a pipe has no offsets, a device perhaps no end
                raise DataError(f"'{path}' is no regular file; write the lines to one")
            with path.open("rb", buffering=0) as file:
                self._scan(file)
        except (OSError, ValueError) as error:  # ValueError: no possible path
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"cannot read '{path}' ({reason}); mend the path") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}  # an opened file cannot travel to another process

    def __len__(self) -> int:
        return len(self._starts)

    def line(self, index: int) -> bytes:
        """Read a line, without its end."""
        start = self._starts[index]
        end = self._starts[index + 1] if index + 1 < len(self) else self._end
        return self._read(index, start, min(end, start + LONGEST_LINE + 1)).partition(b"\n")[0]

    def lines(self) -> Iterator[bytes]:
        """Yield all lines in order, without their ends; several are read at a time."""
        for first in range(0, len(self), _TOGETHER):
            bounds = self._starts[first : first + _TOGETHER + 1]
            if len(bounds) <= _TOGETHER:
                bounds.append(self._end)
            if bounds[-1] - bounds[0] > LONGEST_LINE:
                yield from map(self.line, range(first, first + len(bounds) - 1))
                continue
            data = self._read(first, bounds[0], bounds[-1])
            whole = data.removesuffix(b"\n").split(b"\n")
            if len(whole) == len(bounds) - 1:  # no blank lines among them
                yield from whole
                continue
            for start, end in pairwise(bound - bounds[0] for bound in bounds):
                yield data[start:end].partition(b"\n")[0]

    def number(self, index: int) -> int:
        """Return the number of a line in the file, from 1, blank ones counted."""
        if len(self._behind) == 1:  # the usual case
            return index + 1
        return index + 1 + self._blank[bisect_right(self._behind, index) - 1]

    def where(self, index: int) -> str:
        """Return ``file:line``, for messages."""
        return f"{self._name}:{self.number(index)}"

    def _read(self, index: int, start: int, end: int) -> bytes:
        try:
            if self._file is None:
                self._file = os.open(self.path, os.O_RDONLY)
                weakref.finalize(self, os.close, self._file)
            return os.pread(self._file, end - start, start)
        except OSError as error:
            raise DataError(f"{self.where(index)}: cannot be read ({error.strerror}); mend the path") from error

    def _scan(self, file: BinaryIO) -> None:
        """Find the lines."""
        self._end = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
        file.seek(self._end)
        rest, number = b"", 0
        while block := file.read(max(_BLOCK, len(rest))):
            data = rest + block
            whole = data.rfind(b"\n") + 1
            number += self._add(data[:whole], number)
            rest = data[whole:]
            if len(rest) > LONGEST_LINE:
                raise DataError(
                    f"{self.path}:{number + 1}: the line has more than {LONGEST_LINE:,} bytes; write one object a line"
                )
        self._add(rest, number)

    def _add(self, data: bytes, number: int) -> int:
        """Add the lines of ``data``, ``number`` lines from the start of the file; return how many they are."""
        codes = np.frombuffer(data, np.uint8)
        begins = np.append(0, np.flatnonzero(codes == ord("\n")) + 1)
        ends = begins[1:] if data.endswith(b"\n") or not data else np.append(begins[1:], len(data))
        begins = begins[: len(ends)]
        blank = _WHITE[codes[begins]]
        for row in np.flatnonzero(blank).tolist():
            blank[row] = not data[begins[row] : ends[row]].strip()
        kept = np.flatnonzero(~blank)
        records = len(self) + np.arange(len(kept))
        left_out = kept + number - records
        (changes,) = np.nonzero(np.diff(left_out, prepend=self._blank[-1]))
        self._behind.frombytes(records[changes].tobytes())
        self._blank.frombytes(left_out[changes].tobytes())
        self._starts.frombytes((begins[kept] + self._end).tobytes())
        self._end += len(data)
        return len(begins)
