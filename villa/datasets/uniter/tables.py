"""What a JSON object says about millions of examples or images: numbers, or names of images, as arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from villa.datasets.uniter.image_names import ImageNames, ImageNamesBuilder, Names
from villa.datasets.uniter.indexes import LARGE, Arrays, Built, indexed
from villa.datasets.uniter.json_columns import plain_numbers, plain_texts
from villa.datasets.uniter.json_pieces import PIECE, Pairs, parse, pieces
from villa.datasets.uniter.keys import Found, Keys
from villa.datasets.uniter.strings import Integers, Strings, StringsBuilder
from villa.progress import track

#: Largest number that is stored.
_MOST = (1 << 31) - 1


class NotAnObjectError(Exception):
    """A file holds another JSON value.

    Attributes:
        kind: of what type.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


class WrongEntryError(Exception):
    """An entry of a file has a value that it cannot have.

    Attributes:
        name: of the entry.
        value: its value.
    """

    def __init__(self, name: str, value: Any) -> None:
        super().__init__(name, value)
        self.name, self.value = name, value


#: What the functions that read raise, besides ``WrongEntryError``.
UNREADABLE = (OSError, ValueError, RecursionError, NotAnObjectError)


class Numbers(Mapping[str, int]):
    """A number for every text, in order.

    Args:
        texts: different texts.
        values: their numbers ``[N]`` int32.
        keys: the texts again, if they can be looked up already.
    """

    def __init__(self, texts: Strings, values: Integers, keys: Keys | None = None) -> None:
        self.texts, self.values_array, self._made = texts, values, keys

    @classmethod
    def of(cls, numbers: Mapping[str, int]) -> Numbers:
        """Copy numbers; those that are stored like this already stay as they are."""
        if isinstance(numbers, Numbers):
            return numbers
        return cls(Strings.of(numbers), np.fromiter(numbers.values(), np.int32, len(numbers)))

    @cached_property
    def keys_table(self) -> Keys:
        """The texts, to be looked up."""
        return self._made or Keys.of(self.texts)

    def take(self, rows: Integers) -> Numbers:
        """Return those with these places in the order."""
        return Numbers(self.texts.take(rows), self.values_array[rows])

    def __getitem__(self, text: str) -> int:
        row = self.keys_table.find(text)
        if row is None:
            raise KeyError(text)
        return int(self.values_array[row])

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def __len__(self) -> int:
        return len(self.texts)


class NamesOfTexts(Mapping[str, Names]):
    """The image or images of every text.

    Args:
        texts: the texts.
        names: of the images of each, in the same order.
    """

    def __init__(self, texts: Keys, names: ImageNames) -> None:
        self.texts, self.names = texts, names

    def rows(self, texts: Strings) -> Found:
        """Return the places of texts in the order, -1 for one that is not there."""
        return self.texts.find_all(texts)

    def __getitem__(self, text: str) -> Names:
        row = self.texts.find(text)
        if row is None:
            raise KeyError(text)
        return self.names[row]

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts.texts)

    def __len__(self) -> int:
        return len(self.texts)


def read_numbers(path: Path, least: int) -> Numbers:
    """Read an object of whole numbers.

    Args:
        path: the file.
        least: the smallest number allowed.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or names an entry twice.
        RecursionError: it is not JSON.
        NotAnObjectError: it holds another value.
        WrongEntryError: an entry is no such number.
    """
    arrays = indexed(path, f"numbers{least}", lambda: _build_numbers(path, least))
    keys = load_keys(arrays)
    return Numbers(keys.texts, arrays["values"], keys)


def read_names(path: Path) -> NamesOfTexts:
    """Read an object of names, or lists of names.

    Raises:
        OSError: as for ``read_numbers``, like the others.
        ValueError: see there.
        RecursionError: see there.
        NotAnObjectError: see there.
        WrongEntryError: see there.
    """
    arrays = indexed(path, "names", lambda: _build_names(path))
    names = ImageNames(load_strings(arrays, "names"), arrays["codes"], arrays.get("places"), arrays.get("listed"))
    return NamesOfTexts(load_keys(arrays), names)


def store_strings(texts: Strings, prefix: str) -> Arrays:
    """Return the arrays of texts that are no part of others, with a digest to compare them by."""
    digest = hashlib.blake2b(texts.data.data, digest_size=16)
    digest.update(texts.bounds.data)
    return {
        f"{prefix}_data": texts.data,
        f"{prefix}_bounds": texts.bounds,
        f"{prefix}_digest": np.frombuffer(digest.digest(), np.uint8),
    }


def load_strings(arrays: Arrays, prefix: str) -> Strings:
    """Return what ``store_strings`` stored."""
    digest = bytes(arrays[f"{prefix}_digest"])
    return Strings(arrays[f"{prefix}_data"], arrays[f"{prefix}_bounds"], digest=digest)


def store_keys(keys: Keys) -> Arrays:
    """Return the arrays of texts that can be looked up."""
    return {**store_strings(keys.texts, "keys"), "keys_table": keys.table}


def load_keys(arrays: Arrays) -> Keys:
    """Return what ``store_keys`` stored."""
    return Keys(load_strings(arrays, "keys"), arrays["keys_table"])


def _build_numbers(path: Path, least: int) -> Built:
    texts = StringsBuilder()
    values: list[Integers] = []
    for piece in _pieces(path):
        with suppress(ValueError):
            plain, numbers_cut = plain_numbers(piece)
            if numbers_cut.min() >= least:
                texts.add(plain)
                values.append(numbers_cut)
                continue
        pairs = _pairs(piece)
        names, numbers = _columns(pairs)
        if {*map(type, numbers)} - {int} or min(numbers, default=least) < least or max(numbers, default=0) > _MOST:
            wrong = (pair for pair in pairs if type(pair[1]) is not int or not least <= pair[1] <= _MOST)
            raise WrongEntryError(*next(wrong))
        texts.extend(names)
        values.append(np.fromiter(numbers, np.int32, len(numbers)))
    yield "values", np.concatenate(values)
    yield from store_keys(Keys.of(texts.build())).items()


def _build_names(path: Path) -> Built:
    texts, names = StringsBuilder(), ImageNamesBuilder()
    for piece in _pieces(path):
        with suppress(ValueError):
            plain_keys, plain_names = plain_texts(piece)
            texts.add(plain_keys)
            names.add(plain_names)
            continue
        pairs = _pairs(piece)
        keys, values = _columns(pairs)
        if {*map(type, values)} - {str}:
            wrong = next((pair for pair in pairs if type(pair[1]) is not str and not _are_texts(pair[1])), None)
            if wrong is not None:
                raise WrongEntryError(*wrong)
        texts.extend(keys)
        names.extend(values)
    yield from store_keys(Keys.of(texts.build())).items()
    del texts  # memory for what follows
    built = names.build()
    yield "codes", built.codes
    if built.bounds is not None and built.listed is not None:
        yield "places", built.bounds
        yield "listed", built.listed
    yield from store_strings(built.distinct, "names").items()


def _columns(pairs: Pairs) -> tuple[Sequence[str], Sequence[Any]]:
    """Return the names and the values of an object."""
    names, values = zip(*pairs, strict=True) if pairs else ((), ())
    return names, values


def _pieces(path: Path) -> Iterator[bytes]:
    """Cut up a file, with a progress bar if it is large."""
    size = path.stat().st_size
    with path.open("rb") as file:
        parts = pieces(file)
        if size >= LARGE:
            parts = track(parts, f"index {path.name}, at the first start only", -(-size // PIECE))
        yield from parts


def _pairs(piece: bytes) -> Pairs:
    parsed = parse(piece)
    if not isinstance(parsed, tuple):
        raise NotAnObjectError(type(parsed).__name__)
    return parsed


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
