"""Columns of names and numbers about millions of examples, kept in the cache as Arrow files.

An index is made at the first start and mapped into memory at the next ones, so that all processes of a machine share
one copy, in ``$VILLA_CACHE/indexes`` (``~/.cache/villa/indexes``). It counts as long as the size, the time of the last
change and a digest of parts of the files that it was made from are the same.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import TypeAlias, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from villa.datasets.cache import cache_root
from villa.datasets.ragged import Integers
from villa.files import locked, regular_file, replacing
from villa.mapped_files import name_damaged_files

logger = logging.getLogger(__name__)

Hashes = npt.NDArray[np.uint64]
Column: TypeAlias = pa.ChunkedArray
Built: TypeAlias = Iterable[pa.Table]
_FACTOR = np.uint64(0x9E3779B97F4A7C15)

FORMAT = 3
#: Bytes of its files from which on an index is kept.
LARGE = 1 << 21
#: Bytes and number of the parts of a file that are compared.
_BLOCK, _BLOCKS = 1 << 16, 16
#: Names that are converted at a time, and that are searched through at a time: the table of these takes memory.
CHUNK, _SEARCHED = 1 << 15, 5 << 19


class Names(Sequence[str]):
    """Texts by number, in 4 bytes each besides their own.

    Args:
        column: the texts: strings, or bytes of UTF-8 that may hold halves of surrogate pairs.
        rows: the numbers of those that are meant, in order; None: all.
    """

    def __init__(self, column: Column, rows: Integers | None = None) -> None:
        self.column, self.rows = column, rows

    @classmethod
    def of(cls, texts: Collection[str]) -> Names:
        """Copy texts."""
        try:
            return cls(pa.chunked_array([pa.array(part, pa.string()) for part in _parts(texts)], pa.string()))
        except UnicodeEncodeError:
            data = ([text.encode("utf-8", "surrogatepass") for text in part] for part in _parts(texts))
            return cls(pa.chunked_array([pa.array(part, pa.binary()) for part in data]))

    def __len__(self) -> int:
        return len(self.column) if self.rows is None else len(self.rows)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            places = np.arange(len(self))[index] if self.rows is None else self.rows[index]
            return list(map(_text, self.column.take(pa.array(places)).to_pylist()))
        row = range(len(self))[index]  # IndexError where there is none
        return _text(self.column[row if self.rows is None else int(self.rows[row])].as_py())

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), CHUNK):
            yield from self[start : start + CHUNK]

    def take(self, rows: Integers) -> Names:
        """Return the texts with these numbers; the column is shared."""
        return Names(self.column, rows if self.rows is None else self.rows[rows])


def in_order(rows: Integers, count: int) -> Integers:
    """Return the different ones of numbers below ``count``, in the order in which they come first."""
    end = len(rows)
    first = np.full(count, end, np.int32)
    first[rows[::-1]] = np.arange(end - 1, -1, -1, dtype=np.int32)  # of several, the last one assigned stays
    used = np.flatnonzero(first < end).astype(np.int32)
    return used[np.argsort(first[used], kind="stable")]


def find(names: Column, among: Column) -> Integers:
    """Return the places ``[N]`` int32 of names among different ones, -1 for a name that is not there."""
    return np.arange(len(names), dtype=np.int32) if names.equals(among) else _search(names, among)


def _search(names: Column, among: Column) -> Integers:
    found = np.full(len(names), -1, np.int32)
    parts = -(-len(among) // _SEARCHED)
    for first, last in pairwise(len(among) * part // max(parts, 1) for part in range(parts + 1)):
        at = 0
        for rows in pc.index_in(names, value_set=among[first:last]).chunks:
            places = rows.fill_null(-1).to_numpy()
            np.copyto(found[at : at + len(places)], places + np.int32(first), where=places >= 0)
            at += len(places)
    return found


def refuse_twice(names: Column) -> None:
    """Refuse a name that is there twice.

    Raises:
        ValueError: quoting it.
    """
    if pc.all(pc.less(names[:-1], names[1:])).as_py():  # in ascending order: much faster than to search
        return
    again = np.flatnonzero(_search(names, names) != np.arange(len(names)))
    if len(again):
        raise ValueError(f"it has '{names[int(again[0])].as_py():.80}' twice")


def numbers_of(column: Column) -> Integers:
    """Return a column of whole numbers ``[N]`` without a copy, if it was read from an index."""
    numbers: Integers = column.chunk(0).to_numpy() if column.num_chunks == 1 else column.to_numpy()
    return numbers


def bytes_of(chunk: pa.Array) -> tuple[memoryview, Integers]:
    """Return the bytes of texts, one after another, and where each begins among them: ``[N + 1]`` int32."""
    _, offsets, data = chunk.buffers()
    bounds = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
    return memoryview(data or b"")[bounds[0] : bounds[-1]], bounds - bounds[0] if bounds[0] else bounds


def hashes_of(names: Column) -> Hashes:
    """Return a hash ``[N]`` of the bytes of each name: no secret, and the same everywhere."""
    found = [np.zeros(0, np.uint64)]
    for chunk in (chunk for start in range(0, len(names), CHUNK) for chunk in names.slice(start, CHUNK).chunks):
        data, bounds = bytes_of(chunk)
        padded = np.concatenate([np.frombuffer(data, np.uint8), np.zeros(8, np.uint8)])
        words = np.ndarray(len(padded) - 7, "<u8", padded, strides=(1,))  # eight bytes from any place on
        sizes = np.diff(bounds)
        hashes = sizes.astype(np.uint64) * _FACTOR
        for start in range(0, int(sizes.max(initial=0)), 8):
            (has,) = np.nonzero(sizes > start)
            beyond = np.maximum(8 - (sizes[has] - start), 0).astype(np.uint64) * np.uint64(8)
            hashes[has] = mix(hashes[has] ^ (words[bounds[has] + start] & (~np.uint64(0) >> beyond)))
        found.append(hashes)
    return np.concatenate(found)


def mix(values: Hashes) -> Hashes:
    """Spread the bits of numbers."""
    values = values * _FACTOR
    return values ^ (values >> np.uint64(32))


def cached(
    files: Sequence[Path], what: str, schema: pa.Schema, build: Callable[[], Built], size: int | None = None
) -> pa.Table:
    """Return a table that is made of files: where they are large, the one that is kept, if there is one.

    Args:
        files: the files.
        what: what of them is in the table, and what it depends on besides.
        schema: columns of the table.
        build: makes the table, of one part or several.
        size: bytes that it is made of; None: all of the files.

    Raises:
        OSError: a file cannot be read.
    """
    sizes = [regular_file(path).st_size for path in files]
    if (sum(sizes) if size is None else size) < LARGE:
        return pa.concat_tables([schema.empty_table(), *build()])
    known = hashlib.sha256(repr([what, *(str(path.resolve()) for path in files)]).encode()).hexdigest()[:16]
    name = f"{files[0].stem:.40}-{known}"
    try:
        root = cache_root(None) / "indexes"
        file = root / f"{name}-{_stamp(files)}.arrow"
        found = _load(file, schema)
        if found is None:
            root.mkdir(parents=True, exist_ok=True)
            with locked(root / f"{name}.lock"):  # one process makes it, the others wait
                found = _load(file, schema)
                if found is None:
                    for old in root.glob(f"{glob.escape(name)}-*.arrow"):
                        old.unlink(missing_ok=True)  # who has it mapped keeps it
                    found = _make(file, schema, build)
        return found
    except OSError as error:
        logger.warning("the index of %s is not kept: %s", files[0], error.strerror or error)
        return pa.concat_tables([schema.empty_table(), *build()])


def _stamp(files: Sequence[Path]) -> str:
    """Return what the contents of files are recognised by.

    Raises:
        OSError: one cannot be read.
    """
    digest = hashlib.blake2b(digest_size=12)
    for path in files:
        stat = path.stat()
        digest.update(json.dumps([FORMAT, stat.st_size, stat.st_mtime_ns]).encode())
        with path.open("rb") as file:
            for number in range(_BLOCKS + 1):
                file.seek(max(stat.st_size - _BLOCK, 0) * number // _BLOCKS)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _make(file: Path, schema: pa.Schema, build: Callable[[], Built]) -> pa.Table:
    """Make and keep a table."""
    with (
        replacing(file) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for table in build():
            writer.write_table(table)
    pa.default_memory_pool().release_unused()
    made = _load(file, schema)
    if made is None:
        raise OSError(f"'{file}' cannot be read")
    return made


def _load(file: Path, schema: pa.Schema) -> pa.Table | None:
    """Map a table into memory, if it is there and whole."""
    name_damaged_files()
    try:
        with pa.memory_map(str(file)) as source:
            table = pa.ipc.open_file(source).read_all()
        table.validate(full=True)
    except Exception:  # whatever the library comes across in a damaged file
        return None
    return table if table.schema.equals(schema) else None


def _parts(texts: Iterable[str]) -> Iterator[list[str]]:
    source = iter(texts)
    while part := list(islice(source, CHUNK)):
        yield part


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "surrogatepass")
