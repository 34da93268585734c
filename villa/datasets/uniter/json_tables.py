"""Large JSON files as columns of names and numbers, parsed incrementally."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import ijson
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from villa.datasets.ragged import Integers
from villa.datasets.uniter.index import CHUNK, LARGE, Built, Column, cached, refuse_twice
from villa.progress import track

#: Bytes read at a time, and the longest entry in bytes.
_BLOCK, LONGEST = 1 << 20, 1 << 26
#: Entries parsed at a time: few enough to be freed before a garbage collection examines them.
_AT_ONCE = 512
_QUOTE = b'"'[0]
#: Largest number that can be stored.
_MOST = (1 << 31) - 1
NAME = pa.schema([("name", pa.string())])
NUMBER = pa.schema([("name", pa.string()), ("number", pa.int32())])
_IMAGES = pa.schema([("text", pa.string()), ("names", pa.list_(pa.string())), ("listed", pa.bool_())])


class NotAnObjectError(Exception):
    """A file holds a JSON value other than an object.

    Attributes:
        kind: type of the value.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


class WrongEntryError(Exception):
    """An entry of a file has an invalid value.

    Attributes:
        name: name of the entry.
        value: its value.
    """

    def __init__(self, name: str, value: Any) -> None:
        super().__init__(name, value)
        self.name, self.value = name, value


#: Exceptions of the read functions, besides ``WrongEntryError``.
UNREADABLE = (OSError, ValueError, RecursionError, NotAnObjectError)


class NamedImages(NamedTuple):
    """The image or images of every text.

    Attributes:
        texts: ids of the texts ``[N]``.
        names: concatenated image names of all texts ``[M]``.
        sizes: number of images of each text ``[N]``.
        listed: whether each text has a list of names ``[N]``.
    """

    texts: Column
    names: Column
    sizes: Integers
    listed: npt.NDArray[np.bool_]


def read_numbers(path: Path, least: int) -> pa.Table:
    """Read an object of integers; see ``parse_numbers``. The table of a large file is cached."""
    return cached([path], f"numbers from {least}", NUMBER, lambda: [parse_numbers(path, least)])


def parse_numbers(path: Path, least: int) -> pa.Table:
    """Parse an object of integers into a table with the columns of ``NUMBER``.

    Args:
        path: the file.
        least: the smallest number allowed.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not JSON, or has an entry twice.
        NotAnObjectError: the file holds another JSON value.
        WrongEntryError: an entry is not such a number.
    """
    names, numbers = [], []
    for keys, values in _entries(path):
        found = None if {*map(type, values)} - {int} else np.array(values, np.int64)
        if found is None or found.min() < least or found.max() > _MOST:
            pairs = zip(keys, values, strict=True)
            raise WrongEntryError(*next(p for p in pairs if type(p[1]) is not int or not least <= p[1] <= _MOST))
        names.append(pa.array(keys, pa.string()))
        numbers.append(pa.array(found, pa.int32()))
    table = pa.table([pa.chunked_array(names, pa.string()), pa.chunked_array(numbers, pa.int32())], schema=NUMBER)
    refuse_twice(table["name"])
    return table.combine_chunks()


def read_images(path: Path) -> NamedImages:
    """Read an object of names or lists of names; raises as ``parse_numbers`` does."""
    table = cached([path], "images", _IMAGES, lambda: _build_images(path))
    lists = table["names"].chunks
    return NamedImages(
        table["text"],
        pa.chunked_array([names.flatten() for names in lists], pa.string()),
        np.concatenate([np.zeros(0, np.int32), *(np.diff(names.offsets) for names in lists)]),
        table["listed"].to_numpy(),
    )


def _build_images(path: Path) -> Built:
    texts = []
    for keys, values in _entries(path):
        names, sizes, listed = values, np.ones(len(values), np.int32), np.zeros(len(values), np.bool_)
        if {*map(type, values)} - {str}:
            wrong = next((p for p in zip(keys, values, strict=True) if not _are_names(p[1])), None)
            if wrong is not None:
                raise WrongEntryError(*wrong)
            listed = np.fromiter((isinstance(value, list) for value in values), np.bool_)
            lists = [value if isinstance(value, list) else [value] for value in values]
            names, sizes = list(chain.from_iterable(lists)), np.fromiter(map(len, lists), np.int32)
        bounds = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
        texts.append(pa.array(keys, pa.string()))
        named = pa.ListArray.from_arrays(bounds, pa.array(names, pa.string()))
        yield pa.table([texts[-1], named, pa.array(listed)], schema=_IMAGES)
    refuse_twice(pa.chunked_array(texts, pa.string()))


def list_names(data: memoryview) -> pa.Table:
    """Parse a list of distinct names into a table with the column of ``NAME``.

    Raises:
        ValueError: the data are something else.
    """
    blocks = (bytes(data[start : start + _BLOCK]) for start in range(0, len(data), _BLOCK))
    if not bytes(data[:_BLOCK]).lstrip().startswith(b"["):
        raise ValueError("it begins with something else")
    names = []
    for part in _parts(blocks, lambda source: ijson.items(source, "item")):
        if {*map(type, part)} - {str}:
            raise ValueError("it has other entries")
        names.append(pa.array(part, pa.string()))
    table = pa.table([pa.chunked_array(names, pa.string())], schema=NAME)
    refuse_twice(table["name"])
    return table


def _entries(path: Path) -> Iterator[tuple[Sequence[str], Sequence[Any]]]:
    """Yield an object's names and values in batches, with a progress bar if the file is large."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(_BLOCK).removeprefix(BOM_UTF8)
        blocks: Iterable[bytes] = chain([first], iter(lambda: file.read(_BLOCK), b""))
        if size >= LARGE:
            blocks = track(blocks, f"index {path.name}, at the first start only", -(-size // _BLOCK))
        if not first.lstrip().startswith(b"{"):
            raise NotAnObjectError(_kind(blocks))
        keys: list[str] = []
        values: list[Any] = []
        for part in _parts(blocks, lambda source: ijson.kvitems(source, "", use_float=True)):
            more = zip(*part, strict=True)
            keys += next(more)
            values += next(more)
            if len(keys) >= CHUNK:
                yield keys, values
                keys, values = [], []
        if keys:
            yield keys, values


def _kind(blocks: Iterable[bytes]) -> str:
    """Read JSON to its end and return the type of its value."""
    (first, value), *_ = chain.from_iterable(
        islice(part, 1) for part in _parts(blocks, lambda source: ijson.basic_parse(source, use_float=True))
    )
    return "list" if first == "start_array" else type(value).__name__


def _parts(blocks: Iterable[bytes], parse: Callable[[Any], Iterator[Any]]) -> Iterator[list[Any]]:
    """Yield the parsed items in batches.

    Raises:
        ValueError: the data are not JSON, or an entry is longer than ``LONGEST``.
    """
    read = done = quotes = 0
    escape = b""

    def counted() -> Iterator[bytes]:
        nonlocal read, quotes, escape
        for block in blocks:
            if read - done > LONGEST:
                raise ValueError(f"no entry ends within {LONGEST:,} bytes")
            read += len(block)
            text, escape = escape + block, b""
            if b"\\" in text:
                text = text.replace(rb"\\", b"")
                quotes -= text.count(rb"\"")
                escape = b"\\" if text.endswith(b"\\") else b""
            quotes += int(np.count_nonzero(np.frombuffer(text, np.uint8) == _QUOTE))
            yield block

    try:
        items = parse(ijson.from_iter(counted()))
        while part := list(islice(items, _AT_ONCE)):
            done = read
            yield part
        if quotes % 2:  # ijson accepts an unterminated string after the end
            raise ValueError("trailing garbage")
    except ijson.JSONError as error:
        told = re.search(r"error: ([^\n\\]*)", str(error))
        raise ValueError(told[1] if told else "it ends too early") from error


def _are_names(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))
