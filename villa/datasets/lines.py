"""Files of lines that are read by index: offsets in memory, 8 bytes a line, and lines read on demand."""

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
from villa.files import is_endless

#: Maximum length of a line in bytes, so that a file without line ends does not exhaust memory.
LONGEST_LINE = 1 << 26
#: Bytes per read when scanning for lines, and lines that are read together.
_BLOCK, _TOGETHER = 1 << 20, 256
#: Whether a byte is white space for ``bytes.strip``.
_WHITE = np.array([not bytes([code]).strip() for code in range(256)])


class LineFile:
    """Lines of a file at known offsets.

    They are read on demand, without memory-mapping, so that a file truncated meanwhile is an error, not a crash. The
    object can be sent to forked and spawned workers.

    Args:
        path: the file.
        bounds: offsets in bytes where each line begins, and the end of the last.
    """

    def __init__(self, path: Path, bounds: array[int]) -> None:
        self.path, self._name = path, str(path)
        self._bounds = bounds
        self._file: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}  # an open file cannot be pickled

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def number(self, index: int) -> int:
        """Return the line number in the file, from 1."""
        return index + 1

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
            raise DataError(
                f"{self.where(index)}: cannot be read ({error.strerror}); check the path and the disk"
            ) from error


class TextLines(LineFile):
    """The lines of a file that are not blank.

    Args:
        path: the file; UTF-8, with or without a byte-order mark.

    Raises:
        DataError: the file cannot be read, or a line is too long.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, array("q", [0]))
        # For each gap of blank lines: the first line after it, and the number of blank lines so far.
        self._behind, self._blank = array("q", [0]), array("q", [0])
        try:
            if is_endless(path):
                raise DataError(f"'{path}' is no regular file; write the lines to one")
            with path.open("rb", buffering=0) as file:
                self._scan(file)
        except (OSError, ValueError) as error:  # ValueError: no possible path
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"cannot read '{path}' ({reason}); mend the path") from error

    def line(self, index: int) -> bytes:
        """Read a line without its line end."""
        start, end = self._bounds[index], self._bounds[index + 1]
        return self._read(index, start, min(end, start + LONGEST_LINE + 1)).partition(b"\n")[0]

    def line_blocks(self) -> Iterator[list[bytes]]:
        """Yield all lines in order without their line ends, in lists of several that are read together."""
        for first in range(0, len(self), _TOGETHER):
            bounds = self._bounds[first : first + _TOGETHER + 1]
            if bounds[-1] - bounds[0] > LONGEST_LINE:
                yield from ([self.line(index)] for index in range(first, first + len(bounds) - 1))
                continue
            data = self._read(first, bounds[0], bounds[-1])
            whole = data.removesuffix(b"\n").split(b"\n")
            if len(whole) == len(bounds) - 1:  # no blank lines among them
                yield whole
                continue
            places = pairwise(bound - bounds[0] for bound in bounds)
            yield [data[start:end].partition(b"\n")[0] for start, end in places]

    def number(self, index: int) -> int:
        """Return the line number in the file, from 1, blank lines included."""
        if len(self._behind) == 1:  # the usual case
            return index + 1
        return index + 1 + self._blank[bisect_right(self._behind, index) - 1]

    def _scan(self, file: BinaryIO) -> None:
        """Scan the file for lines."""
        self._bounds[0] = file.seek(len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0)
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
        """Add the lines of ``data``, which follow ``number`` others; return how many there are."""
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
        end = self._bounds.pop()
        self._bounds.frombytes((begins[kept] + end).tobytes())
        self._bounds.append(end + len(data))
        return len(begins)
