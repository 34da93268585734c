"""Rows of CSV, TSV, JSON-lines, parquet and Arrow files, read from the beginning to the end in constant memory."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from villa.datasets.lines import LONGEST_LINE
from villa.datasets.own.records import JsonLines
from villa.datasets.sources.fields import Columns
from villa.datasets.sources.unpacked import Row
from villa.errors import DataError, about, reading

#: Yields the rows of a file.
Read = Callable[[Path, Columns], Iterator[Row]]

#: Rows, and bytes, that are converted at a time.
_ROWS, _BYTES = 1024, 1 << 23
#: How parquet is read: page by page, with their checksums compared if there are any.
_SPARING: dict[str, Any] = {"pre_buffer": False, "buffer_size": 1 << 20, "page_checksum_verification": True}
#: Beginning of every message of an Arrow stream, of which the last is empty; the first versions had none.
_MESSAGE, _EMPTY = b"\xff" * 4, b"\0" * 4
_ADVICE = "copy it again, or write it again"


def read_csv(path: Path, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a CSV file (``,`` or ``;``) or a TSV file with the lines that they begin in.

    The first line names the columns. Blank lines are skipped.

    Raises:
        DataError: naming the line that cannot be read.
    """
    name = path.with_suffix("").name if path.suffix == ".gz" else path.name
    opened = cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb"))  # noqa: SIM115
    with closing(opened) as file:
        lines = _Lines(path, file)
        first = next(lines, "")
        table = csv.reader(_chain(first, lines), delimiter=_delimiter(name, first), strict=True)
        header = _next_row(table, lines, 1) or []
        with about(f"{path}:1"):
            fields = columns.among(header)
        places = {field: header.index(column) for field, column in fields.items()}
        while True:
            number = lines.number + 1
            row = _next_row(table, lines, number)
            if row is None:
                return
            if row and len(row) != len(header):
                raise DataError(
                    f"{path}:{number}: the line has {len(row)} cells, the first {len(header)}; write as many, and put "
                    "texts with separators in double quotes"
                )
            if row:
                yield number, {field: row[place] for field, place in places.items()}


class _Lines(Iterator[str]):
    """The decoded lines of a file, with the number of the last one."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.number = path, 0
        self._file = file

    def __next__(self) -> str:
        where = f"{self.path}:{self.number + 1}"
        with reading(f"{where}: cannot be read", _ADVICE):
            line = self._file.readline(LONGEST_LINE + 1)
        if not line:
            raise StopIteration
        if len(line) > LONGEST_LINE:
            raise DataError(f"{where}: the line has more than {LONGEST_LINE:,} bytes; end every row with a line feed")
        self.number += 1
        try:
            return line.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise DataError(f"{where}: not UTF-8 text (byte 0x{byte:02x}); save the file as UTF-8") from error


def _chain(first: str, lines: Iterator[str]) -> Iterator[str]:
    if first:
        yield first
    yield from lines


def _delimiter(name: str, first: str) -> str:
    if name.lower().endswith((".tsv", ".tab")):
        return "\t"
    return next((mark for mark in ",;\t" if mark in first), ",")


def _next_row(table: Iterator[list[str]], lines: _Lines, number: int) -> list[str] | None:
    usual = csv.field_size_limit(LONGEST_LINE)  # of the whole process
    try:
        return next(table, None)
    except csv.Error as error:
        to, problem = f" to {lines.number}" if lines.number > number else "", str(error).partition(" - ")[0]
        raise DataError(
            f"{lines.path}:{number}: the row in line {number}{to} is damaged ({problem}); look for a quote that is not "
            "closed, write quotes within quotes twice, and end lines with line feeds"
        ) from error
    finally:
        csv.field_size_limit(usual)


def read_json_lines(path: Path, columns: Columns) -> Iterator[Row]:
    """Yield the records of a JSON-lines file with their lines."""
    lines = JsonLines(path)
    for index, record in enumerate(lines):
        with about(lines.where(index)):
            fields = columns.of(record)
        yield lines.number(index), fields


def read_parquet(path: Path, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a parquet file with their numbers, from 1.

    Raises:
        DataError: the file is damaged, or lacks a column.
    """
    import pyarrow.parquet as pq

    with _reading(path), pq.ParquetFile(path, **_SPARING) as file:
        schema = file.schema_arrow
        fields, names = _fields(path, schema, columns)
        size = sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
        rows = max(1, min(_ROWS, _BYTES * file.metadata.num_rows // max(size, 1)))
        batches = file.iter_batches(rows, columns=[*dict.fromkeys(fields.values())], use_threads=False)
        yield from _rows(path, batches, fields, names)


def read_arrow(path: Path, columns: Columns) -> Iterator[Row]:
    """Yield the rows of an Arrow file or stream (Feather, Hugging Face) with their numbers, from 1.

    Raises:
        DataError: the file is damaged or cut off, or lacks a column.
    """
    with _reading(path), pa.memory_map(str(path)) as source:
        if source.size() and source.read_at(6, 0) == b"ARROW1":
            opened = pa.ipc.open_file(source)
            batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
        else:
            opened = pa.ipc.open_stream(source)
            end = (_MESSAGE if source.read_at(4, 0) == _MESSAGE else b"") + _EMPTY
            if not source.read_at(8, max(source.size() - 8, 0)).endswith(end):
                raise ValueError("it is cut off, for its end is missing")
            batches = iter(opened)
        fields, names = _fields(path, opened.schema, columns)
        yield from _rows(path, batches, fields, names)


def read_batches(name: str, schema: Any, batches: Iterator[Any], columns: Columns) -> Iterator[Row]:
    """Yield the rows of Arrow's batches or tables with their numbers, from 1.

    Args:
        name: what messages call their source.
        schema: their columns.
        batches: the batches.
        columns: columns by field.
    """
    fields, names = _fields(name, schema, columns)
    yield from _rows(name, batches, fields, names)


def class_names(schema: Any) -> dict[str, Sequence[str]]:
    """Return the names of classes by column, where Hugging Face's note in a schema has them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = {name: feature["names"] for name, feature in features.items() if feature.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    return {name: names for name, names in found.items() if isinstance(names, list)}


def _reading(path: Path) -> Any:
    return reading(f"'{path}' cannot be read", _ADVICE)


def _fields(name: Any, schema: Any, columns: Columns) -> tuple[dict[str, str], dict[str, Sequence[str]]]:
    with about(str(name)):
        return columns.among(schema.names), class_names(schema)


def _rows(
    name: Any, batches: Iterator[Any], fields: Mapping[str, str], classes: Mapping[str, Sequence[str]]
) -> Iterator[Row]:
    number = 0
    for every in batches:
        batch = every.select([every.schema.names.index(column) for column in dict.fromkeys(fields.values())])
        _check(batch, name, number)
        whole = max(1, min(_ROWS, _BYTES * batch.num_rows // max(batch.nbytes, 1)))
        for start in range(0, batch.num_rows, whole):
            part = batch.slice(start, whole)
            columns = {
                field: _named(part.column(column).to_pylist(), classes.get(column), f"{name}: row ", number + 1)
                for field, column in fields.items()
            }
            for row in range(part.num_rows):
                number += 1
                yield number, {field: values[row] for field, values in columns.items()}


def _check(batch: Any, name: Any, before: int) -> None:
    """Refuse inconsistent data, which would be read beyond its end, and text that is not UTF-8."""
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        for row in range(batch.num_rows):
            with reading(f"{name}: row {before + row + 1} cannot be read", _ADVICE):
                batch.slice(row, 1).validate(full=True)
        raise


def _named(values: list[Any], names: Sequence[str] | None, where: str, first: int) -> list[Any]:
    """Return the names of classes instead of their numbers; -1 is no label."""
    if names is None:
        return values
    for number, value in enumerate(values, first):
        if type(value) is int and not -1 <= value < len(names):
            raise DataError(
                f"{where}{number}: the class is {value}, but there are {len(names)}, from 0; mend the table"
            )
    known = {**dict(enumerate(names)), -1: None}
    return [known.get(value, value) for value in values]
