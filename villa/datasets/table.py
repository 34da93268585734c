"""A split whose records are in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from villa.datasets.base import Example, Split
from villa.datasets.reader import Reader, Record


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
        return f"example '{self._records[index].id}'"

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens plus regions of every record."""
        return [self._reader.length((r.text, r.pair), r.images, self._store) for r in self._records]
