"""Read the entries of one large JSON object without holding the file in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from villa.errors import DataError
from villa.files import regular_file
from villa.json_values import RepeatedNameError, unique_names

_CHUNK = 1 << 20
#: Most characters of a key or value, so that a damaged file is not read as one endless value.
_LONGEST = 1 << 24
_BLANK = " \t\n\r"


def read_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a file with one JSON object.

    Raises:
        DataError: the file is missing, or contains something else.
    """
    try:
        regular_file(path)
        with path.open(encoding="utf-8-sig") as file:
            yield from _Scanner(file, path).entries()
    except OSError as error:
        raise DataError(f"cannot read the file '{path}' ({error.strerror}); mend the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"the file '{path}' is not valid JSON (no UTF-8); download it again") from error


class _Scanner:
    """Scans the tokens of a file, of which only a few chunks are in memory."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._place, self._number = "", 0, 0
        self._decode = json.JSONDecoder(object_pairs_hook=unique_names).raw_decode

    def entries(self) -> Iterator[tuple[str, Any]]:
        self._sign("{")
        if self._peek() == "}":
            self._sign("}")
        else:
            yield self._entry()
            while self._sign(",}") == ",":
                yield self._entry()
        if self._peek():
            raise self._error("something follows the object")

    def _entry(self) -> tuple[str, Any]:
        self._number += 1
        key = self._value()
        if not isinstance(key, str):
            raise self._error("a key is no text")
        self._sign(":")
        return key, self._value()

    def _sign(self, allowed: str) -> str:
        """Consume and return one of the allowed characters."""
        found = self._peek()
        if not found or found not in allowed:
            raise self._error(f"'{found}' where '{allowed[0]}' should be" if found else "it ends too early")
        self._place += 1
        return found

    def _peek(self) -> str:
        """Return the next character that is not blank, or ``""`` at the end."""
        while True:
            while self._place < len(self._text) and self._text[self._place] in _BLANK:
                self._place += 1
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def _value(self) -> Any:
        """Consume a string or an object; other values could be cut in two by the end of a chunk."""
        if (found := self._peek()) not in ('"', "{"):
            raise self._error(f"'{found}' where a text or an object should be" if found else "it ends too early")
        while True:
            try:
                value, self._place = self._decode(self._text, self._place)
            except RecursionError:
                raise self._error("too deeply nested") from None
            except RepeatedNameError as error:
                raise self._error(str(error)) from error
            except ValueError as error:
                if len(self._text) - self._place > _LONGEST or not self._more():
                    raise self._error(str(error)) from error
            else:
                return value

    def _more(self) -> bool:
        """Drop consumed text and read at least as much as is left; return False at the end."""
        self._text = self._text[self._place :]
        self._place = 0
        chunk = self._file.read(max(_CHUNK, len(self._text)))
        self._text += chunk
        return bool(chunk)

    def _error(self, problem: str) -> DataError:
        where = f"entry {self._number}: " if self._number else ""
        return DataError(f"the file '{self._path}' is not one JSON object ({where}{problem}); download it again")
