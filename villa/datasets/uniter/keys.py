"""Which number a text has, among millions: a sorted table of hashes, whose every answer is compared with the text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from villa.datasets.uniter.strings import CHUNK, Hashes, Integers, Strings, hash_text, narrow

#: Numbers of texts.
Found = Integers


class Keys:
    """Different texts with their numbers.

    Args:
        texts: the texts.
        table: what ``make_table`` makes of them.
    """

    def __init__(self, texts: Strings, table: Hashes) -> None:
        self.texts, self.table = texts, table
        self._low = _low_bits(len(texts))
        self._asked: tuple[object, Found] | None = None

    @classmethod
    def of(cls, texts: Strings) -> Keys:
        """Make the table.

        Raises:
            ValueError: a text is there twice; the message quotes it.
        """
        keys = cls(texts, make_table(texts))
        twice = next(keys._repeated(), None)
        if twice is not None:
            raise ValueError(f"it has '{twice:.80}' twice")
        return keys

    def __len__(self) -> int:
        return len(self.texts)

    def by_hash(self) -> Strings:
        """Return the texts in the order of their hashes, which does not depend on their numbers."""
        return self.texts.take((self.table & np.uint64(self._low)).astype(np.int64))

    def find(self, text: str) -> int | None:
        """Return a text's number, or None."""
        hashed = hash_text(text.encode("utf-8", "surrogatepass")) & ~self._low
        at = int(np.searchsorted(self.table, np.uint64(hashed)))
        while at < len(self.table) and (entry := int(self.table[at])) & ~self._low == hashed:
            if self.texts[entry & self._low] == text:
                return entry & self._low
            at += 1
        return None

    def find_all(self, texts: Strings) -> Found:
        """Return the numbers ``[T]`` of texts, -1 for one that is not there; what was asked last is remembered."""
        if self.texts.rows is None and texts.shares(self.texts):
            return texts.numbers()
        asked = texts.identity()
        if self._asked is not None and asked is not None and self._asked[0] == asked:
            return self._asked[1]
        found = np.full(len(texts), -1, narrow(len(self)))
        for start in range(0, len(texts), CHUNK):
            self._find_chunk(texts, start, found[start : start + CHUNK])
        found.flags.writeable = False
        self._asked = asked, found
        return found

    def _find_chunk(self, texts: Strings, start: int, found: Found) -> None:
        low = np.uint64(self._low)
        hashed = texts.hashes(start, start + len(found)) & ~low
        order = np.argsort(hashed)  # neighbours in the table are asked for together
        at = np.empty(len(found), np.int64)
        at[order] = np.searchsorted(self.table, hashed[order])
        asked = np.arange(len(found))
        while len(asked := asked[at[asked] < len(self.table)]):
            entries = self.table[at[asked]]
            alike = entries & ~low == hashed[asked]
            asked, rows = asked[alike], (entries[alike] & low).astype(np.int64)
            equal = texts.same(asked + start, self.texts, rows)
            found[asked[equal]] = rows[equal]
            asked = asked[~equal]
            at[asked] += 1

    def _repeated(self) -> Iterator[str]:
        """Yield texts that are there twice."""
        distance = 1
        while len(first := self._alike(distance)):
            one, other = ((self.table[at] & np.uint64(self._low)).astype(np.int64) for at in (first, first + distance))
            for row in one[self.texts.same(one, self.texts, other)].tolist():
                yield self.texts[row]
            distance += 1

    def _alike(self, distance: int) -> Integers:
        """Return the places in the table of hashes that are there again ``distance`` places on."""
        bits, found = ~np.uint64(self._low), [np.zeros(0, np.int64)]
        for start in range(0, len(self.table) - distance, CHUNK):
            later = self.table[start + distance : start + distance + CHUNK] & bits
            found.append(start + np.flatnonzero(self.table[start : start + len(later)] & bits == later))
        return np.concatenate(found)


def make_table(texts: Strings) -> Hashes:
    """Return the hashes of texts, their last bits replaced by the texts' numbers, in ascending order."""
    table = np.empty(len(texts), np.uint64)
    low = np.uint64(_low_bits(len(texts)))
    for start in range(0, len(texts), CHUNK):
        stop = min(start + CHUNK, len(texts))
        table[start:stop] = texts.hashes(start, stop) & ~low | np.arange(start, stop, dtype=np.uint64)
    table.sort()
    return table


def distinct(texts: Strings) -> tuple[Integers, Integers]:
    """Tell equal texts apart from others.

    Returns:
        The numbers of the texts that are there for the first time, ascending, and for every text ``[N]`` int32 which of
        these it equals.
    """
    table, low = make_table(texts), np.uint64(_low_bits(len(texts)))
    first = np.arange(len(texts), dtype=np.int32)  # of every text, the first one that has its hash, then that equals it
    before, leader = None, np.int32(0)
    for start in range(0, len(table), CHUNK):
        part = table[start : start + CHUNK]
        rows, bare = (part & low).astype(np.int32), part & ~low
        new = np.append(before is None or bare[0] != before, bare[1:] != bare[:-1])
        leads = np.maximum.accumulate(np.where(new, np.arange(len(part)), -1))
        first[rows] = np.where(leads < 0, leader, rows[leads])
        before, leader = bare[-1], first[rows[-1]]
    del table
    others: dict[str, int] = {}
    for start in range(0, len(texts), CHUNK):
        some = np.arange(start, min(start + CHUNK, len(texts)))
        equal = texts.same(some, texts, first[some])
        for row in some[~equal].tolist():  # those few whose hash is another text's
            first[row] = others.setdefault(texts[row], row)
    new = first == np.arange(len(texts), dtype=np.int32)
    return np.flatnonzero(new), (np.cumsum(new, dtype=np.int32) - 1)[first]


def _low_bits(count: int) -> int:
    """Return the mask of the bits that numbers below ``count`` take."""
    return (1 << max(count - 1, 0).bit_length()) - 1
