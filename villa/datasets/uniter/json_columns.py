"""Columns of JSON objects and lists, cut out of the text itself: it takes less time than an object for each entry.

Only what is plain is cut: entries of one kind on one line, without escapes, as ``json.dump`` writes them. The rest is
for the parser, which also says what is wrong.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from villa.datasets.uniter.strings import Bytes, Integers, Texts, gather

_QUOTE, _ZERO, _SPACE = b'"'[0], b"0"[0], b" "[0]
#: Separators: json.dump writes them with a space, unless it is asked not to.
_COLON, _COMMA = rb": ?", rb", ?"
_NUMBER = re.compile(rb"(" + _COLON + rb")\d+(" + _COMMA + rb')"')
#: Most digits of a number that is cut out.
_DIGITS = 9


class _Quoted:
    """A piece of JSON with the places of its texts.

    Args:
        piece: an object or a list.

    Raises:
        ValueError: it is not plain.
    """

    def __init__(self, piece: bytes) -> None:
        self.piece, self.bytes = piece, np.frombuffer(piece, np.uint8)
        if b"\\" in piece or self.bytes.min(initial=_SPACE) < _SPACE:
            raise ValueError("it has escapes, or several lines")
        if not piece.isascii():
            piece.decode()
        quotes = np.flatnonzero(self.bytes == _QUOTE)
        self.begins, self.ends = quotes[::2] + 1, quotes[1::2]
        if len(self.begins) < 2 or len(self.begins) > len(self.ends):
            raise ValueError("it has no two texts")

    def between(self, first: int, step: int, pattern: bytes) -> None:
        """Require that one of ``, `` or the like is between each text and the next one, from a text on.

        Args:
            first: number of the text.
            step: from one text that counts to the next.
            pattern: of what is allowed; the first place says what it is everywhere.

        Raises:
            ValueError: there is something else.
        """
        ends, begins = self.ends[first:-1:step], self.begins[first + 1 :: step]
        self.require(re.fullmatch(pattern, self.piece[ends[0] + 1 : begins[0] - 1]), ends + 1, begins - 1)

    def require(
        self, separator: re.Match[bytes] | bytes | None, begins: Integers, ends: Integers | None = None
    ) -> None:
        """Require bytes at places: up to ``ends``, where they are given."""
        expected = separator if isinstance(separator, bytes) else separator[0] if separator else b""
        if not expected or (ends is not None and not (ends - begins == len(expected)).all()):
            raise ValueError("it has other separators")
        if not all((self.bytes[begins + at] == byte).all() for at, byte in enumerate(expected)):
            raise ValueError("it has other separators")

    def closed(self, brackets: bytes, end: int) -> None:
        """Require brackets around the first text and what ends at ``end``."""
        if (
            self.piece[:1] != brackets[:1]
            or self.piece[1 : self.begins[0] - 1].strip(b" ")
            or self.piece[end:] != brackets[1:]
        ):
            raise ValueError("it does not begin or end like an object or a list")

    def cut(self, first: int = 0, step: int = 1) -> Texts:
        """Return every ``step``-th text, from one on."""
        begins = self.begins[first::step]
        return gather(self.bytes, begins, self.ends[first::step] - begins)


def plain_list(piece: bytes) -> Texts:
    """Cut out a list of texts.

    Raises:
        ValueError: it is not plain.
    """
    quoted = _Quoted(piece)
    quoted.between(0, 1, _COMMA)
    quoted.closed(b"[]", int(quoted.ends[-1]) + 1)
    return quoted.cut()


def plain_texts(piece: bytes) -> tuple[Texts, Texts]:
    """Cut out the names and the values of an object of texts.

    Raises:
        ValueError: it is not plain, or has fewer than two entries.
    """
    quoted = _Quoted(piece)
    if len(quoted.begins) % 2 or len(quoted.begins) < 4:
        raise ValueError("it has no two entries of a name and a text each")
    quoted.between(0, 2, _COLON)
    quoted.between(1, 2, _COMMA)
    quoted.closed(b"{}", int(quoted.ends[-1]) + 1)
    return quoted.cut(0, 2), quoted.cut(1, 2)


def plain_numbers(piece: bytes) -> tuple[Texts, Integers]:
    """Cut out the names and the values ``[N]`` int32 of an object of whole numbers of at least 0.

    Raises:
        ValueError: it is not plain, or has fewer than two entries, or large numbers.
    """
    quoted = _Quoted(piece)
    like = _NUMBER.match(piece, int(quoted.ends[0]) + 1)
    if like is None:
        raise ValueError("its values are no numbers, or it has other separators")
    begins = quoted.ends + 1 + len(like[1])
    ends = np.append(quoted.begins[1:] - 1 - len(like[2]), len(piece) - 1)
    quoted.require(like[1], quoted.ends + 1)
    quoted.require(like[2], ends[:-1])
    quoted.closed(b"{}", int(ends[-1]))
    return quoted.cut(), _numbers(quoted.bytes, begins, ends - begins)


def _numbers(text: Bytes, begins: Integers, sizes: npt.NDArray[np.int64]) -> Integers:
    """Read decimal numbers without leading zeros."""
    longest = int(sizes.max())
    if sizes.min() < 1 or longest > _DIGITS:
        raise ValueError("numbers are missing, or large")
    values = np.zeros(len(sizes), np.int32)
    for place in range(longest):
        (has,) = np.nonzero(sizes > place)
        digits = text[begins[has] + place] - np.uint8(_ZERO)
        if digits.max() > 9 or (place == 0 and ((digits == 0) & (sizes > 1)).any()):
            raise ValueError("values are no whole numbers")
        values[has] = values[has] * 10 + digits
    return values
