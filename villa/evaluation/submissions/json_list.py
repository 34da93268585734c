"""Submissions that are a JSON list of objects."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from villa.errors import DataError
from villa.evaluation.submissions.base import EntrySubmission
from villa.evaluation.submissions.reading import read_objects

#: Whole numbers as predictions write them; no leading zero, sign or blank, so that each has one spelling.
_WHOLE = re.compile(r"0|[1-9][0-9]{0,17}")


class JsonSubmission(EntrySubmission[dict[str, Any]]):
    """A JSON list of objects, one a line. More fields than the format asks for are allowed."""

    suffix = ".json"

    def read(self, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the objects of the list."""
        return read_objects(file, "validate")

    def encode(self, entries: Iterator[dict[str, Any]]) -> Iterator[str]:
        """Yield one line an object, in ASCII."""
        opening = "[\n"
        for entry in entries:
            yield opening + json.dumps(entry, allow_nan=False)
            opening = ",\n"
        yield "\n]\n"


def checked_field(entry: Mapping[str, Any], name: str, valid: Callable[[Any], bool], form: str, where: str) -> Any:
    """Return a field of an entry.

    Args:
        entry: the object.
        name: the field.
        valid: says whether a value is allowed.
        form: what is allowed, in words.
        where: place of the entry, for the message.

    Raises:
        DataError: the field is missing or not valid.
    """
    if name not in entry:
        raise DataError(f"{where} has no '{name}' (it has {', '.join(map(repr, entry))[:80] or 'nothing'}); add {form}")
    if not valid(entry[name]):
        raise DataError(f"{where} has '{name}' = {entry[name]!r:.60}; it must be {form}")
    return entry[name]


def is_text(value: Any) -> bool:
    """Say whether a value is a text; it may be empty."""
    return isinstance(value, str)


def is_id(value: Any) -> bool:
    """Say whether a value is a text with something in it."""
    return isinstance(value, str) and bool(value)


def is_whole(value: Any) -> bool:
    """Say whether a value is a whole number from 0 that fits in 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def text_answer(record: Mapping[str, Any], where: str) -> str:
    """Return the answer of a prediction, which must be a text.

    Raises:
        DataError: it is a label's number.
    """
    return str(checked_field(record, "answer", is_text, "the text of an answer", where))


def whole_id(record: Mapping[str, Any], where: str) -> int:
    """Return the id of a prediction as the number that it spells.

    Raises:
        DataError: it does not spell a whole number.
    """
    return int(checked_field(record, "id", lambda id_: _WHOLE.fullmatch(id_) is not None, "a whole number", where))
