"""Submissions that are a table in a CSV file."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import ClassVar

from villa.errors import DataError
from villa.evaluation.submissions.base import EntrySubmission
from villa.evaluation.submissions.reading import line_blocks

#: Ids that need no quotes in a CSV file, which not every reader of the graders understands.
_PLAIN = re.compile(r"[^\s,\"'\x00-\x1f\x7f](?:[^,\"\x00-\x1f\x7f]*[^\s,\"\x00-\x1f\x7f])?")


class CsvSubmission(EntrySubmission[list[str]]):
    """A table with a row an example; the first column is the id.

    Attributes:
        columns: names of the columns.
        header: whether the first line names the columns.
    """

    suffix = ".csv"
    columns: ClassVar[tuple[str, ...]]
    header: ClassVar[bool]

    def read(self, file: Path) -> Iterator[tuple[str, list[str]]]:
        """Yield the rows, without the header.

        Raises:
            DataError: the header is another one, or a row has another number of columns.
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
        """Yield one line a row, the header first if there is one."""
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
    """Return an id that can stand in a table.

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
