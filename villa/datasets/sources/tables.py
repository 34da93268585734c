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

#: Rows, and bytes, that are converted at a time.
_ROWS, _BYTES = 1024, 1 << 23
#: What an Arrow stream ends with, and one of the first versions.
_END_OF_STREAM = (b"\xff\xff\xff\xff\0\0\0\0", b"\0\0\0\0")
_ADVICE = "copy it again, or write it again"


def read_csv(path: Path, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a CSV file (``,`` or ``;``) or a TSV file with the lines that they begin in.

    The first line names the columns. Blank lines are skipped.

    Raises:
        DataError: naming the line that cannot be read.
    """
    name = path.with_suffix("").name if path.suffix == ".gz" else path.name
    opened = cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb"))  # noqa: SIM115
    csv.field_size_limit(LONGEST_LINE)
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
    try:
        return next(table, None)
    except csv.Error as error:
        to = f" to {lines.number}" if lines.number > number else ""
        raise DataError(
            f"{lines.path}:{number}: the row in line {number}{to} is damaged ({error}); look for a quote that is not "
            "closed, write quotes within quotes twice, and end lines with line feeds"
        ) from error


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

    with _reading(path), pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
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
            if not source.read_at(8, max(source.size() - 8, 0)).endswith(_END_OF_STREAM):
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
    for batch in batches:
        whole = max(1, min(_ROWS, _BYTES * batch.num_rows // max(batch.nbytes, 1)))
        for start in range(0, batch.num_rows, whole):
            part = batch.slice(start, whole)
            columns = {field: _values(part, column, f"{name}: row {number + 1}") for field, column in fields.items()}
            for row in range(part.num_rows):
                number += 1
                values = {field: column[row] for field, column in columns.items()}
                for field, column in fields.items():
                    if column in classes and type(values[field]) is int:
                        with about(f"{name}: row {number}"):
                            values[field] = _class_name(values[field], classes[column], column)
                yield number, values


def _values(part: Any, column: str, where: str) -> list[Any]:
    with reading(f"{where}, or one of the {part.num_rows - 1} after it: column '{column}' cannot be read", _ADVICE):
        values: list[Any] = part.column(column).to_pylist()
        return values


def _class_name(number: int, names: Sequence[str], column: str) -> str | None:
    if number == -1:  # not labelled
        return None
    if not 0 <= number < len(names):
        raise DataError(
            f"'{column}' is {number}, but its {len(names)} classes are 0 to {len(names) - 1}; mend the table"
        )
    return names[number]


#: How each kind of file is read.
Read = Callable[[Path, Columns], Iterator[Row]]
READERS: dict[str, Read] = {
    **dict.fromkeys((".csv", ".tsv", ".tab", ".csv.gz", ".tsv.gz"), read_csv),
    **dict.fromkeys((".parquet", ".pq"), read_parquet),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), read_arrow),
    **dict.fromkeys((".jsonl", ".ndjson"), read_json_lines),
}
