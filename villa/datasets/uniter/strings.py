"""Millions of texts as two arrays: a name of 16 bytes takes 24 here, and 73 and more as an object of Python."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, overload

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.integer]
Hashes = npt.NDArray[np.uint64]

#: Bytes behind the last text, so that whole words can be read anywhere.
PADDING = 8
#: Texts that are worked on at a time.
CHUNK = 1 << 18
_FACTOR = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Texts:
    """Texts, one after another.

    Attributes:
        data: their UTF-8 bytes.
        sizes: bytes of each ``[N]`` int32.
    """

    data: Bytes
    sizes: Integers


class Strings(Sequence[str]):
    """Texts by number.

    Args:
        data: their UTF-8 bytes one after another, and ``PADDING`` zeros.
        bounds: where in ``data`` each begins, and the end of the last: ``[N + 1]``.
        rows: the texts that are meant, in order; None: all.
        digest: of ``data`` and ``bounds``, if it is known.
    """

    def __init__(
        self, data: Bytes, bounds: Integers, rows: Integers | None = None, digest: bytes | None = None
    ) -> None:
        self.data, self.bounds, self.rows, self.digest = data, bounds, rows, digest

    @classmethod
    def of(cls, texts: Iterable[str]) -> Strings:
        """Copy texts."""
        builder, source = StringsBuilder(), iter(texts)
        while part := list(islice(source, CHUNK)):
            builder.extend(part)
        return builder.build()

    def take(self, rows: Integers) -> Strings:
        """Return the texts with these numbers; their bytes are shared."""
        return Strings(self.data, self.bounds, rows if self.rows is None else self.rows[rows], self.digest)

    def compact(self) -> Strings:
        """Return a copy that holds no other text's bytes."""
        builder = StringsBuilder()
        for start in range(0, len(self), CHUNK):
            begins, sizes = self._spans(np.arange(start, min(start + CHUNK, len(self))))
            builder.add(gather(self.data, begins, sizes))
        return builder.build()

    def __len__(self) -> int:
        return len(self.bounds) - 1 if self.rows is None else len(self.rows)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._decode(np.arange(start, stop, step))
        return self._decode(np.array([range(len(self))[index]]))[0]  # IndexError where there is none

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), CHUNK):
            yield from self._decode(np.arange(start, min(start + CHUNK, len(self))))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Strings):
            if self.shares(other) and (self.rows is None) == (other.rows is None):
                return self.rows is None or np.array_equal(self.numbers(), other.numbers())
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return isinstance(other, list) and list(self) == other

    __hash__ = None  # type: ignore[assignment]

    def shares(self, other: Strings) -> bool:
        """Say whether both choose among the same texts."""
        if self.digest is not None and other.digest is not None:
            return self.digest == other.digest
        return self.bounds is other.bounds or (
            np.array_equal(self.bounds, other.bounds) and np.array_equal(self.data, other.data)
        )

    def identity(self) -> object:
        """Return what other texts with an equal one are the same by, or None if that is not known."""
        if self.digest is None:
            return None
        chosen = None if self.rows is None else hashlib.blake2b(np.ascontiguousarray(self.rows).data).digest()
        return self.digest, chosen

    def numbers(self) -> Integers:
        """Return which of all texts are meant."""
        return np.arange(len(self)) if self.rows is None else self.rows

    def hashes(self, start: int, stop: int) -> Hashes:
        """Return a hash ``[stop - start]`` of each of these texts, equal to ``hash_text`` of it."""
        begins, sizes = self._spans(np.arange(start, stop))
        found = sizes.astype(np.uint64) * np.uint64(_FACTOR)
        for number, word in self._words(begins, sizes):
            found[number] = _mix(found[number] ^ word)
        return found

    def hashes_with(self, numbers: Integers) -> Hashes:
        """Return, ascending, a hash of each text and its number: the same for the same pairs in any order.

        Args:
            numbers: one for each text.
        """
        found = numbers.astype(np.uint64)
        for start in range(0, len(found), CHUNK):
            part = found[start : start + CHUNK]
            part[:] = _mix(self.hashes(start, start + len(part)) + _mix(part))
        found.sort()
        return found

    def same(self, rows: Integers, other: Strings, others: Integers) -> npt.NDArray[np.bool_]:
        """Say for pairs of texts ``[P]``, one of these and one of ``other``, whether they are equal."""
        begins, sizes = self._spans(rows)
        theirs, their_sizes = other._spans(others)
        equal: npt.NDArray[np.bool_] = sizes == their_sizes
        shared = np.minimum(sizes, their_sizes)
        pairs = zip(self._words(begins, shared), other._words(theirs, shared), strict=True)
        for (number, ours), (_, word) in pairs:
            equal[number] &= ours == word
        return equal

    def _decode(self, rows: Integers) -> list[str]:
        begins, sizes = self._spans(rows)
        ends = begins + sizes
        spans = zip(begins.tolist(), ends.tolist(), strict=True)
        if len(rows) > 1 and np.array_equal(begins[1:], ends[:-1]):  # neighbours: decoded together
            first, together = int(begins[0]), self.data[begins[0] : ends[-1]].tobytes()
            if together.isascii():
                text = together.decode()
                return [text[begin - first : end - first] for begin, end in spans]
        view = self.data.data
        return [str(view[begin:end], "utf-8", "surrogatepass") for begin, end in spans]

    def _spans(self, rows: Integers) -> tuple[Integers, Integers]:
        """Return where texts begin, and their sizes in bytes."""
        at = rows if self.rows is None else self.rows[rows]
        begins = self.bounds[at]
        return begins, self.bounds[at + 1] - begins

    def _words(self, begins: Integers, sizes: Integers) -> Iterator[tuple[Integers, Hashes]]:
        """Yield, for every eight bytes of the longest text, which texts have them, and these bytes as numbers."""
        words = np.ndarray(len(self.data) - PADDING + 1, "<u8", self.data, strides=(1,))
        for start in range(0, int(sizes.max(initial=0)), 8):
            (has,) = np.nonzero(sizes > start)
            word = words[begins[has] + start]
            beyond = np.maximum(8 - (sizes[has] - start), 0).astype(np.uint64) * np.uint64(8)
            yield has, word & (np.uint64(_MASK) >> beyond)


class StringsBuilder:
    """Collects texts."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._sizes: list[Integers] = []

    def add(self, texts: Texts) -> None:
        """Add texts."""
        self._data += texts.data.data
        self._sizes.append(texts.sizes)

    def extend(self, texts: Sequence[str]) -> None:
        """Add texts."""
        joined = "".join(texts)
        if joined.isascii():
            self._data += joined.encode()
            sizes = map(len, texts)
        else:
            encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
            self._data += b"".join(encoded)
            sizes = map(len, encoded)
        self._sizes.append(np.fromiter(sizes, np.int32, len(texts)))

    def build(self) -> Strings:
        """Return the texts; add no more."""
        self._data += bytes(PADDING)
        bounds = np.zeros(sum(map(len, self._sizes)) + 1, narrow(len(self._data)))
        if self._sizes:
            np.cumsum(np.concatenate(self._sizes), out=bounds[1:])
            self._sizes.clear()
        return Strings(np.frombuffer(self._data, np.uint8), bounds)


def gather(data: Bytes, begins: Integers, sizes: Integers) -> Texts:
    """Copy spans of bytes; those of one size are copied together.

    Args:
        data: the bytes.
        begins: where each span begins ``[N]``.
        sizes: bytes of each ``[N]``.
    """
    ends = np.cumsum(sizes, dtype=np.int64)
    found = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
    for size in np.flatnonzero(np.bincount(sizes)).tolist():
        if size:
            (has,) = np.nonzero(sizes == size)
            _windows(found, size)[ends[has] - size] = _windows(data, size)[begins[has]]
    return Texts(found, sizes.astype(np.int32))


def _windows(data: Bytes, size: int) -> npt.NDArray[np.void]:
    """View every ``size`` neighbours as one item."""
    return np.ndarray(len(data) - size + 1, f"V{size}", data, strides=(1,))


def narrow(most: int) -> np.dtype[np.signedinteger[Any]]:
    """Return the type of whole numbers up to ``most``: of 32 bits, if they suffice."""
    return np.dtype(np.int32) if most <= np.iinfo(np.int32).max else np.dtype(np.int64)


def hash_text(data: bytes) -> int:
    """Return the hash of a text's bytes; no secret, and the same everywhere."""
    found = len(data) * _FACTOR & _MASK
    for start in range(0, len(data), 8):
        found ^= int.from_bytes(data[start : start + 8], "little")
        found = found * _FACTOR & _MASK
        found ^= found >> 32
    return found


def _mix(values: Hashes) -> Hashes:
    values = values * np.uint64(_FACTOR)
    return values ^ (values >> np.uint64(32))
