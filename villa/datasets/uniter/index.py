"""Columns of names and numbers about millions of examples, cached as Arrow files.

An index is built on first use and memory-mapped afterwards, so that all processes of a machine share one copy, in
``$VILLA_CACHE/indexes`` (``~/.cache/villa/indexes``). It is valid while the size, the modification time and a digest of
parts of its source files are unchanged.
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

from villa.datasets.cache_folder import cache_root
from villa.datasets.ragged import Integers
from villa.files import locked, regular_file, replacing
from villa.mapped_files import name_damaged_files

logger = logging.getLogger(__name__)

Hashes = npt.NDArray[np.uint64]
Column: TypeAlias = pa.ChunkedArray
Built: TypeAlias = Iterable[pa.Table]
_FACTOR = np.uint64(0x9E3779B97F4A7C15)

FORMAT = 3
#: Smallest size in bytes of the source files to cache an index.
LARGE = 1 << 21
#: Size in bytes, and number, of the parts of a file in its digest.
_BLOCK, _BLOCKS = 1 << 16, 16
#: Names converted at a time, and names searched at a time, which bounds the memory of the hash table.
CHUNK, _SEARCHED = 1 << 15, 5 << 19


class Names(Sequence[str]):
    """Strings by number, with 4 bytes of overhead each.

    Args:
        column: the strings, or UTF-8 bytes that may contain lone surrogates.
        rows: numbers of the selected strings, in order; None for all.
    """

    def __init__(self, column: Column, rows: Integers | None = None) -> None:
        self.column, self.rows = column, rows

    @classmethod
    def of(cls, texts: Collection[str]) -> Names:
        """Copy strings."""
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
        row = range(len(self))[index]  # IndexError if out of range
        return _text(self.column[row if self.rows is None else int(self.rows[row])].as_py())

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), CHUNK):
            yield from self[start : start + CHUNK]

    def take(self, rows: Integers) -> Names:
        """Return the strings with these numbers; the column is shared."""
        return Names(self.column, rows if self.rows is None else self.rows[rows])


def in_order(rows: Integers, count: int) -> Integers:
    """Return the distinct values among numbers below ``count``, in order of first occurrence."""
    end = len(rows)
    first = np.full(count, end, np.int32)
    first[rows[::-1]] = np.arange(end - 1, -1, -1, dtype=np.int32)  # of duplicates, the last assignment stays
    used = np.flatnonzero(first < end).astype(np.int32)
    return used[np.argsort(first[used], kind="stable")]


def find(names: Column, among: Column) -> Integers:
    """Return the positions ``[N]`` int32 of names among distinct ones, -1 for a missing name."""
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
    """Check that no name occurs twice.

    Raises:
        ValueError: a name does; the message quotes it.
    """
    if pc.all(pc.less(names[:-1], names[1:])).as_py():  # ascending: much faster than a search
        return
    again = np.flatnonzero(_search(names, names) != np.arange(len(names)))
    if len(again):
        raise ValueError(f"it has '{names[int(again[0])].as_py():.80}' twice")


def numbers_of(column: Column) -> Integers:
    """Return a column of integers ``[N]``, without a copy if read from an index."""
    numbers: Integers = column.chunk(0).to_numpy() if column.num_chunks == 1 else column.to_numpy()
    return numbers


def bytes_of(chunk: pa.Array) -> tuple[memoryview, Integers]:
    """Return the concatenated bytes of strings and their offsets ``[N + 1]`` int32."""
    _, offsets, data = chunk.buffers()
    bounds = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
    return memoryview(data or b"")[bounds[0] : bounds[-1]], bounds - bounds[0] if bounds[0] else bounds


def hashes_of(names: Column) -> Hashes:
    """Return a hash ``[N]`` of each name's bytes: not cryptographic, but equal on all machines."""
    found = [np.zeros(0, np.uint64)]
    for chunk in (chunk for start in range(0, len(names), CHUNK) for chunk in names.slice(start, CHUNK).chunks):
        data, bounds = bytes_of(chunk)
        padded = np.concatenate([np.frombuffer(data, np.uint8), np.zeros(8, np.uint8)])
        words = np.ndarray(len(padded) - 7, "<u8", padded, strides=(1,))  # eight bytes from every offset
        sizes = np.diff(bounds)
        hashes = sizes.astype(np.uint64) * _FACTOR
        for start in range(0, int(sizes.max(initial=0)), 8):
            (has,) = np.nonzero(sizes > start)
            beyond = np.maximum(8 - (sizes[has] - start), 0).astype(np.uint64) * np.uint64(8)
            hashes[has] = mix(hashes[has] ^ (words[bounds[has] + start] & (~np.uint64(0) >> beyond)))
        found.append(hashes)
    return np.concatenate(found)


def mix(values: Hashes) -> Hashes:
    """Mix the bits of numbers."""
    values = values * _FACTOR
    return values ^ (values >> np.uint64(32))


def cached(
    files: Sequence[Path], what: str, schema: pa.Schema, build: Callable[[], Built], size: int | None = None
) -> pa.Table:
    """Return a table built from files, cached if the files are large.

    Args:
        files: the source files.
        what: key of the table's contents and parameters.
        schema: columns of the table.
        build: builds the table, in one or several parts.
        size: source bytes; None for the size of all files.

    Raises:
        OSError: a file cannot be read.
    """
    sizes = [regular_file(path).st_size for path in files]
    if (sum(sizes) if size is None else size) < LARGE:
        return pa.concat_tables([schema.empty_table(), *build()])
    known = hashlib.sha256(repr([what, *(str(path.resolve()) for path in files)]).encode()).hexdigest()[:16]
    name = f"{files[0].stem:.40}-{known}"
    try:
        root = cache_root() / "indexes"
        file = root / f"{name}-{_stamp(files)}.arrow"
        found = _load(file, schema)
        if found is None:
            root.mkdir(parents=True, exist_ok=True)
            with locked(root / f"{name}.lock"):  # one process builds it, the others wait
                found = _load(file, schema)
                if found is None:
                    for old in root.glob(f"{glob.escape(name)}-*.arrow"):
                        old.unlink(missing_ok=True)  # processes that have it mapped keep it
                    found = _make(file, schema, build)
        return found
    except OSError as error:
        logger.warning("the index of %s is not kept: %s", files[0], error.strerror or error)
        return pa.concat_tables([schema.empty_table(), *build()])


def _stamp(files: Sequence[Path]) -> str:
    """Return a key of the files' contents.

    Raises:
        OSError: a file cannot be read.
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
    """Build, save and map a table."""
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
    """Memory-map a table, or return None if it is missing or damaged."""
    name_damaged_files()
    try:
        with pa.memory_map(str(file)) as source:
            table = pa.ipc.open_file(source).read_all()
        table.validate(full=True)
    except Exception:  # a damaged file may raise anything
        return None
    return table if table.schema.equals(schema) else None


def _parts(texts: Iterable[str]) -> Iterator[list[str]]:
    source = iter(texts)
    while part := list(islice(source, CHUNK)):
        yield part


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "surrogatepass")
