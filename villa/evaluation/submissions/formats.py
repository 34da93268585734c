"""Submissions as JSON lists and CSV tables."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from villa.errors import DataError
from villa.evaluation.submissions.base import EntrySubmission, line_blocks, read_objects

#: Integers in predictions; no leading zero, sign or blank, so that each has one spelling.
_WHOLE = re.compile(r"0|[1-9][0-9]{0,17}")


class JsonSubmission(EntrySubmission[dict[str, Any]]):
    """A JSON list of objects, one per line. Fields beyond those of the format are allowed."""

    suffix = ".json"

    def read(self, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the objects of the list."""
        return read_objects(file, "validate")

    def encode(self, entries: Iterator[dict[str, Any]]) -> Iterator[str]:
        """Yield one line per object, in ASCII."""
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
        valid: returns whether a value is allowed.
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
    """Return whether a value is a string, perhaps an empty one."""
    return isinstance(value, str)


def is_id(value: Any) -> bool:
    """Return whether a value is a string that is not empty."""
    return isinstance(value, str) and bool(value)


def is_whole(value: Any) -> bool:
    """Return whether a value is an integer in [0, 2^63)."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def text_answer(record: Mapping[str, Any], where: str) -> str:
    """Return the answer of a prediction, which must be text.

    Raises:
        DataError: it is the index of a label.
    """
    return str(checked_field(record, "answer", is_text, "the text of an answer", where))


def whole_id(record: Mapping[str, Any], where: str) -> int:
    """Return the id of a prediction as an integer.

    Raises:
        DataError: it is not an integer.
    """
    return int(checked_field(record, "id", lambda id_: _WHOLE.fullmatch(id_) is not None, "a whole number", where))


#: Ids that need no quotes in a CSV file, which not every grader's reader supports.
_PLAIN = re.compile(r"[^\s,\"'\x00-\x1f\x7f](?:[^,\"\x00-\x1f\x7f]*[^\s,\"\x00-\x1f\x7f])?")


class CsvSubmission(EntrySubmission[list[str]]):
    """A table with a row per example; the first column is the id.

    Attributes:
        columns: names of the columns.
        header: whether the first line names the columns.
    """

    suffix = ".csv"
    columns: ClassVar[tuple[str, ...]]
    header: ClassVar[bool]

    def read(self, file: Path) -> Iterator[tuple[str, list[str]]]:
        """Yield the rows without the header.

        Raises:
            DataError: the header or the number of columns of a row is wrong.
        """
        lines = chain.from_iterable(line_blocks(file, "validate"))
        rows = csv.reader(lines, quoting=csv.QUOTE_NONE)  # neither names, ids nor numbers need quotes
        while True:
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise DataError(f"{file} line {rows.line_num} cannot be read ({error}); mend it") from error
            if row is None:
                break
            where = f"{file} line {rows.line_num}"
            if self.header and rows.line_num == 1:
                self._check_header(row, where)
                continue
            if len(row) != len(self.columns):
                raise DataError(f"{where} has {len(row):,} columns; a {self.name} submission has {len(self.columns)}")
            yield where, row

    def encode(self, entries: Iterator[list[str]]) -> Iterator[str]:
        """Yield one line per row, after the header if there is one."""
        rows: Iterator[Sequence[str]] = chain([self.columns], entries) if self.header else entries
        return (",".join(row) + "\n" for row in rows)

    def _check_header(self, row: list[str], where: str) -> None:
        if tuple(row) == self.columns:
            return
        pairs = zip(row, self.columns, strict=False)
        column = next(
            (n for n, (given, wanted) in enumerate(pairs) if given != wanted), min(len(row), len(self.columns))
        )
        given = repr(row[column])[:60] if column < len(row) else "missing"
        wanted = self.columns[column] if column < len(self.columns) else "nothing"
        count = f"{len(self.columns)} names from {self.columns[0]} to {self.columns[-1]}"
        raise DataError(f"{where}: column {column + 1} is {given}, not {wanted}; the first line must hold the {count}")


def checked_id(text: str, column: str, where: str) -> str:
    """Return an id after checking that it needs no quotes in a CSV file.

    Args:
        text: the id.
        column: name of its column, for the message.
        where: its place, for the message.

    Raises:
        DataError: it is empty, or holds a comma, a quote or an invisible character.
    """
    if _PLAIN.fullmatch(text) is None:
        raise DataError(
            f"{where} has {column} {text!r:.60}; an id is text without commas, quotes or blanks at its ends"
        )
    return text
