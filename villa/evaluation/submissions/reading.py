"""Files that are read in pieces, so that memory does not grow with them, with a display of the progress."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import repeat, takewhile
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

from villa.engine.progress import track
from villa.errors import DataError
from villa.json_values import RepeatedNameError, unique_names

T = TypeVar("T", str, list[str])

#: Characters that are read at a time; also the longest element of a JSON list.
_PIECE = 1 << 20
_BLANKS = re.compile(r"[ \t\r\n]*")


def text_pieces(path: Path, description: str) -> Iterator[str]:
    """Yield the text of a UTF-8 file a million characters at a time.

    Args:
        path: the file.
        description: what is being done, for the display.

    Raises:
        DataError: the file cannot be read or is not UTF-8.
    """
    return _pieces(path, description, lambda file: file.read(_PIECE))


def line_blocks(path: Path, description: str, encoding: str = "utf-8") -> Iterator[list[str]]:
    """Yield the lines of a UTF-8 file in blocks of about a million characters; see ``text_pieces``.

    Args:
        path: the file.
        description: what is being done, for the display.
        encoding: ``utf-8-sig`` goes over a byte-order mark, which no submission may have.
    """
    return _pieces(path, description, lambda file: file.readlines(_PIECE), encoding)


def _pieces(path: Path, description: str, take: Callable[[TextIO], T], encoding: str = "utf-8") -> Iterator[T]:
    try:
        with path.open(encoding=encoding, newline="") as file:
            total = os.fstat(file.fileno()).st_size // _PIECE + 1
            yield from track(takewhile(bool, map(take, repeat(file))), description, total)
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 text; give the file as it was written") from error
    except (OSError, ValueError) as error:  # ValueError: no possible path
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot read '{path}' ({reason}); mend the path") from error


def read_objects(path: Path, description: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSON list in order, each with its place (``file entry 3``) for messages.

    Args:
        path: the file.
        description: what is being done, for the display.

    Raises:
        DataError: the file cannot be read, or is not a JSON list of objects.
    """
    text = _Cursor(path, description)
    if text.peek() != "[":
        raise DataError(f"{path} is not a JSON list; it must begin with '['")
    text.skip()
    number = 0
    while text.peek() != "]" or number:
        number += 1
        where = f"{path} entry {number}"
        if text.peek() != "{":
            raise DataError(f"{where} is not a JSON object; the file must be a list of objects")
        yield where, text.object(where)
        if text.peek() not in (",", "]"):
            raise DataError(f"{where} is not followed by ',' or ']'; is the file complete?")
        if text.peek() == "]":
            break
        text.skip()
    text.skip()
    if text.peek():
        raise DataError(f"{path} goes on after the end of its list; it must hold one JSON list")


class _Cursor:
    """A place in the text of a JSON file, of which only the current piece is held."""

    def __init__(self, path: Path, description: str) -> None:
        self._pieces = text_pieces(path, description)
        self._decoder = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=unique_names)
        self._text = ""
        self._at = 0

    def peek(self) -> str:
        """Return the next character that is not blank; ``""`` at the end."""
        while True:
            blank = _BLANKS.match(self._text, self._at)
            self._at = blank.end() if blank else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def skip(self) -> None:
        """Go over one character."""
        self._at += 1

    def object(self, where: str) -> dict[str, Any]:
        """Return the object that begins here and go to its end.

        Raises:
            DataError: it is not valid JSON, or too long.
        """
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:  # perhaps because the rest of it is not read yet
                final = isinstance(error, RecursionError | RepeatedNameError)
                if final or len(self._text) - self._at > _PIECE or not self._read():
                    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                    raise DataError(f"{where} is not valid JSON ({reason}); is the file complete?") from error
            else:
                return dict(value)

    def _read(self) -> bool:
        piece = next(self._pieces, "")
        self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")
