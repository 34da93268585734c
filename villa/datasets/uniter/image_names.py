"""The images of every example, as numbers of the different ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from villa.datasets.uniter.keys import distinct
from villa.datasets.uniter.strings import Integers, Strings, StringsBuilder, Texts

#: Name of an example's image, or names of its images.
Names = str | list[str]
Flags = npt.NDArray[np.bool_]


class ImageNames(Sequence[Names]):
    """Names by the number of the example.

    Args:
        distinct: the different names.
        codes: which of them the examples have, one example after another: ``[M]``.
        bounds: where in ``codes`` each example begins, and the end of the last: ``[N + 1]``; None: each has one.
        listed: whether each example has a list of names ``[N]``; None: none has.
    """

    def __init__(
        self, distinct: Strings, codes: Integers, bounds: Integers | None = None, listed: Flags | None = None
    ) -> None:
        self.distinct, self.codes, self.bounds, self.listed = distinct, codes, bounds, listed

    @classmethod
    def of(cls, names: Iterable[Names]) -> ImageNames:
        """Copy names."""
        builder = ImageNamesBuilder()
        builder.extend(names)
        return builder.build()

    def take(self, rows: Integers) -> ImageNames:
        """Return the names of the examples with these numbers."""
        if self.bounds is None or self.listed is None:
            return ImageNames(self.distinct, self.codes[rows])
        sizes = np.diff(self.bounds)[rows]
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        places = np.arange(bounds[-1]) + np.repeat(self.bounds[rows] - bounds[:-1], sizes)
        return ImageNames(self.distinct, self.codes[places], bounds, self.listed[rows])

    def __len__(self) -> int:
        return len(self.codes) if self.bounds is None else len(self.bounds) - 1

    @overload
    def __getitem__(self, index: int) -> Names: ...

    @overload
    def __getitem__(self, index: slice) -> list[Names]: ...

    def __getitem__(self, index: int | slice) -> Names | list[Names]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # IndexError where there is none
        if self.bounds is None or self.listed is None:
            return self.distinct[int(self.codes[index])]
        codes = self.codes[self.bounds[index] : self.bounds[index + 1]].tolist()
        names = [self.distinct[code] for code in codes]
        return names if self.listed[index] else names[0]

    def __iter__(self) -> Iterator[Names]:
        return (self[index] for index in range(len(self)))

    def first_list(self, *, but: int | None = None) -> int | None:
        """Return the number of the first example that has a list of names.

        Args:
            but: instead, of the first one that does not have a list of so many.
        """
        if self.bounds is None or self.listed is None:
            return 0 if but is not None and len(self) else None
        found = self.listed if but is None else ~(self.listed & (np.diff(self.bounds) == but))
        return int(found.argmax()) if found.any() else None

    def mentioned(self, first: int = 0, step: int = 1) -> Strings:
        """Return the different names that there are, in the order in which they come first.

        Args:
            first: the first name that counts.
            step: from one that counts to the next: with 2, those of a column of pairs.
        """
        return self.distinct.take(_in_order(self.codes[first::step], len(self.distinct)))

    def single(self) -> Strings:
        """Return the different names of the examples without a list, in the order in which they come first."""
        if self.bounds is None or self.listed is None:
            return self.mentioned()
        return self.take(np.flatnonzero(~self.listed)).mentioned()

    def total(self, numbers: Integers) -> Integers:
        """Return for every example ``[N]`` the sum of what its images have.

        Args:
            numbers: of every different name.
        """
        found = numbers[self.codes]
        if self.bounds is None:
            return found
        sums: Integers = np.concatenate([[0], np.cumsum(found)])
        return sums[self.bounds[1:]] - sums[self.bounds[:-1]]


class ImageNamesBuilder:
    """Collects the names of examples."""

    def __init__(self) -> None:
        self._names = StringsBuilder()
        self._sizes: list[Integers] = []
        self._listed: list[Flags] = []

    def extend(self, names: Iterable[Names]) -> None:
        """Add the names of further examples."""
        names = list(names)
        listed = np.fromiter((isinstance(entry, list) for entry in names), np.bool_, len(names))
        if listed.any():
            entries = [entry if isinstance(entry, list) else [entry] for entry in names]
            self._sizes.append(np.fromiter(map(len, entries), np.int32, len(entries)))
            names = [name for entry in entries for name in entry]
        else:
            self._sizes.append(np.ones(len(names), np.int32))
        self._names.extend(names)  # type: ignore[arg-type]
        self._listed.append(listed)

    def add(self, names: Texts) -> None:
        """Add further examples that have one name each."""
        self._names.add(names)
        self._sizes.append(np.broadcast_to(np.int32(1), len(names.sizes)))  # takes no memory
        self._listed.append(np.broadcast_to(np.False_, len(names.sizes)))

    def build(self) -> ImageNames:
        """Return the names; add no more."""
        names = self._names.build()
        first, codes = distinct(names)
        texts = names.take(first).compact() if len(first) < len(names) else names
        listed = np.concatenate([np.zeros(0, np.bool_), *self._listed])
        if not listed.any():
            return ImageNames(texts, codes)
        return ImageNames(texts, codes, np.concatenate([[0], np.cumsum(np.concatenate(self._sizes))]), listed)


def _in_order(codes: Integers, count: int) -> Integers:
    """Return the different codes in the order in which they come first."""
    end = len(codes)
    first = np.full(count, end, np.int64)
    first[codes[::-1]] = np.arange(end - 1, -1, -1)  # of several, the last one assigned stays
    used = np.flatnonzero(first < end)
    return used[np.argsort(first[used], kind="stable")]
