"""A split whose records are in memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from villa.datasets.base import Example, Split
from villa.datasets.reader import Reader, Record
from villa.datasets.text import CutTexts
from villa.errors import about


class TableSplit(Split):
    """Records in memory, over images or region features in a store.

    Args:
        records: the records.
        reader: makes examples of them.
        store: what ``reader.open`` returned.
    """

    def __init__(self, records: Sequence[Record], reader: Reader, store: Any) -> None:
        self._records, self._reader, self._store = records, reader, store

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        return self._reader.example(self._records[index], self._store)

    def describe(self, index: int) -> str:
        """See the base class."""
        record = self._records[index]
        return f"the example of {record.where}" if record.where else f"example '{record.id}'"

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens plus regions of every record."""
        images = (sum(self._reader.image_length(self._store, i) for i in r.images) for r in self._records)
        return [read + more for (read, _), more in zip(self._text_lengths, images, strict=True)]

    def warnings(self) -> list[str]:
        """See the base class."""
        cut = CutTexts()
        for read, whole in self._text_lengths:
            cut.add(read, whole)
        return cut.warnings()

    @cached_property
    def _text_lengths(self) -> list[tuple[int, int]]:
        """Tokens of every record's text that are read, and all of them."""
        return list(map(self._measure, range(len(self))))

    def _measure(self, index: int) -> tuple[int, int]:
        record = self._records[index]
        with about(record.where or self.describe(index)):
            return self._reader.text_lengths(record.text, record.pair, images=bool(record.images))
