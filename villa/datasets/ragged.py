"""Rows of different numbers of values, one after another in flat arrays: of millions, a few bytes each."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer[Any]]


class Ragged:
    """Rows of different numbers of values.

    Args:
        values: of all rows, one after another: ``[M]``.
        bounds: where each row begins, and the end of the last: ``[N + 1]``.
    """

    def __init__(self, values: Integers, bounds: Integers) -> None:
        self.values, self.bounds = values, bounds

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, row: int) -> list[int]:
        values: list[int] = self.values[self.bounds[row] : self.bounds[row + 1]].tolist()
        return values

    def rows(self, first: int, end: int) -> list[list[int]]:
        """Return rows ``first`` to ``end - 1``, as far as there are so many."""
        bounds = self.bounds[first : end + 1].tolist()
        values = self.values[bounds[0] : bounds[-1]].tolist()
        return [values[start - bounds[0] : stop - bounds[0]] for start, stop in pairwise(bounds)]

    @property
    def sizes(self) -> Integers:
        """Number of values of each row ``[N]``."""
        return np.diff(self.bounds)

    def take(self, rows: Integers) -> Ragged:
        """Return these rows; nothing is copied if they are all rows in order."""
        if len(rows) == len(self) and (rows == np.arange(len(rows), dtype=rows.dtype)).all():
            return self
        sizes = self.sizes[rows]
        bounds = np.zeros(len(rows) + 1, self.bounds.dtype)
        np.cumsum(sizes, out=bounds[1:])
        places = np.repeat(self.bounds[rows] - bounds[:-1], sizes)
        places += np.arange(len(places), dtype=places.dtype)
        return Ragged(self.values[places], bounds)

    def sums(self, numbers: Integers) -> Integers:
        """Add up numbers ``[M]``, one for each value, within each row ``[N]``."""
        if len(self.values) == len(self) and (self.sizes == 1).all():
            return numbers
        sums: Integers = np.concatenate([[0], np.cumsum(numbers)])
        return sums[self.bounds[1:]] - sums[self.bounds[:-1]]


class Lists:
    """Short lists of numbers that are added one by one; without bounds while all are equally long.

    Args:
        kind: type code of the numbers, as of an ``array``.

    Attributes:
        values: the numbers of all lists, one after another.
    """

    def __init__(self, kind: str = "i") -> None:
        self.values: array[Any] = array(kind)
        self._bounds = array("q")
        self._count = self._size = 0

    def append(self, values: Collection[float]) -> None:
        """Add a list."""
        if not self._bounds and len(values) != self._size:
            if self._count:
                self._bounds.extend(self._size * number for number in range(self._count + 1))
            self._size = len(values)  # of the first list
        self.values.extend(values)
        self._count += 1
        if self._bounds:
            self._bounds.append(len(self.values))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return tuple(self.values[self.places(index)])

    def places(self, index: int) -> slice:
        """Return where in ``values`` a list is."""
        if self._bounds:
            return slice(self._bounds[index], self._bounds[index + 1])
        return slice(self._size * index, self._size * (index + 1))

    def sums(self, of: Callable[[Iterable[int]], Integers]) -> Integers:
        """Return for each list the sum of its numbers' values, ``[N]``; ``of`` maps 0, 1, ... to values."""
        values = np.frombuffer(self.values, self.values.typecode)
        if not len(values):
            return np.zeros(self._count, np.int32)
        numbers = of(range(int(values.max()) + 1))[values]
        if self._bounds:
            return Ragged(values, np.frombuffer(self._bounds, np.int64)).sums(numbers)
        summed: Integers = numbers.reshape(-1, self._size).sum(1, dtype=np.int32)
        return summed
