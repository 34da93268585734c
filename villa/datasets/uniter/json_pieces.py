"""Large JSON objects and lists, parsed a piece at a time: a file of a gigabyte needs a few megabytes."""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import Any, BinaryIO

#: Bytes that are parsed at a time, and the longest entry.
PIECE, LONGEST = 1 << 22, 1 << 26
#: Where the last boundary of a piece is looked for first.
_TAIL = 1 << 16
_ESCAPE = re.compile(rb"\\.", re.DOTALL)
#: A comma before an entry, once escapes are masked; it may still be within a string.
_BOUNDARY = {b"{": re.compile(rb',(?=\s*"[^"]*"\s*:)'), b"[": re.compile(rb',(?=\s*")')}
_ENDS = {b"{": b"}", b"[": b"]"}

#: An object: its names and values, in order, doubles included.
Pairs = tuple[tuple[str, Any], ...]


class MemoryFile:
    """Reads bytes in memory like a file, without a copy of all of them."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def read(self, size: int) -> bytes:
        """Return the next bytes, at most ``size``."""
        self._at += size
        return bytes(self._data[self._at - size : self._at])


def pieces(file: BinaryIO | MemoryFile) -> Iterator[bytes]:
    """Cut up an object, or a list of texts.

    Args:
        file: JSON in UTF-8; anything of less than ``PIECE`` bytes may also be another value.

    Yields:
        Parts of it in order, each with brackets of its own; see ``parse``.

    Raises:
        ValueError: it is neither of the two, or an entry is longer than ``LONGEST``.
    """
    buffer = file.read(PIECE)
    whole, buffer = len(buffer) < PIECE, buffer.removeprefix(BOM_UTF8)
    if whole:
        yield buffer
        return
    start = buffer.lstrip()[:1]
    if start not in _ENDS:
        raise ValueError("it does not begin with an object or a list")
    opening = b""
    while more := file.read(PIECE):
        cut = _last_boundary(buffer, start)
        if cut is not None:
            yield opening + buffer[:cut] + _ENDS[start]
            opening, buffer = start, buffer[cut + 1 :]
        elif len(buffer) > LONGEST:
            raise ValueError(f"no entry ends within {LONGEST:,} bytes")
        buffer += more
    yield opening + buffer


def parse(piece: bytes) -> Any:
    """Parse a piece: ``Pairs`` of an object (as are all objects within it), a list of a list.

    Raises:
        ValueError: it is not JSON.
        RecursionError: it is nested too deeply.
    """
    return json.loads(piece, object_pairs_hook=tuple)


def _last_boundary(buffer: bytes, start: bytes) -> int | None:
    """Return the place of the last comma between entries, if any is found."""
    masked = _ESCAPE.sub(b"__", buffer) if b"\\" in buffer else buffer
    quotes = masked.count(b'"')
    for begin in (max(len(masked) - _TAIL, 0), 0):
        for match in reversed(list(_BOUNDARY[start].finditer(masked, begin))):
            if (quotes - masked.count(b'"', match.start())) % 2 == 0:  # outside of strings
                return match.start()
    return None
