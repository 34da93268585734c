"""A split whose questions are in memory, each distinct text tokenised once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from villa.datasets.base import Example, Split
from villa.datasets.stores.base import RegionStore


@dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        id: unique within the split.
        text: index of its text.
        image: index of its image in the store; ignored without a store.
        target: class index or soft targets ``[labels]``; None when there is no answer.
    """

    id: str
    text: int
    image: int = 0
    target: int | Tensor | None = None


class TableSplit(Split):
    """Questions in memory over region features in a store.

    Args:
        rows: the questions.
        texts: word-piece ids of the distinct texts, ``[T]`` each.
        store: region features; None for text only.
    """

    def __init__(self, rows: Sequence[Row], texts: Sequence[Tensor], store: RegionStore | None) -> None:
        self._rows, self._texts, self._store = rows, texts, store

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[index]
        features, boxes = (None, None) if self._store is None else self._store[row.image]
        return Example(row.id, self._texts[row.text], None, features, boxes, row.target)

    @property
    def lengths(self) -> Sequence[int]:
        """Word-pieces plus regions of every question."""
        store = self._store
        return [len(self._texts[row.text]) + (store.regions(row.image) if store else 0) for row in self._rows]
