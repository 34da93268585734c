"""Prediction files, written and read as a stream.

They are JSON lines ``{"id": ..., "answer": ..., "score": ...}`` or, by the ending of the name, CSV or parquet.
"""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from villa.errors import DataError
from villa.files import fsync, room_for
from villa.json_values import is_number, parse_json

#: Rows of a group of a parquet file.
_GROUP = 10_000
_FORM = '{"id": text, "answer": text or whole number, "score": number}'


class PredictionWriter:
    """Writes predictions one batch at a time; the file gets its name when all are written.

    Used as a context manager: leaving the block normally puts the file in place; an error in it leaves an older file
    unchanged. Memory does not grow with the number of predictions.

    Args:
        path: the file; missing folders are created. ``.csv`` and ``.parquet`` are tables, whose columns are the fields
            of the first prediction; any other is JSON lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")

    def __enter__(self) -> PredictionWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._temporary.open("xb")
        self._form = _FORMS.get(self.path.suffix.lower(), _Lines)(self._file)
        return self

    def write(self, ids: Sequence[str], answers: Sequence[Mapping[str, Any]]) -> None:
        """Write one line per example.

        Args:
            ids: ids of the examples, as in ``Batch.ids``.
            answers: their predictions by ``TaskDataset.decode``: ``{"answer": ..., "score": ...}`` and more.

        Raises:
            DataError: a prediction is not of that form, so that it could not be read back.
        """
        for id_, answer in zip(ids, answers, strict=True):
            record = {"id": id_, **answer}
            _check(record, f"prediction for '{id_}'")
            with room_for(self.path):
                self._form.write(record)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with room_for(self.path), self._file:
                if error is None:
                    self._form.finish()
                self._file.flush()
                os.fsync(self._file.fileno())
            if error is None:
                self._temporary.replace(self.path)
                fsync(self.path.parent)
        finally:
            self._temporary.unlink(missing_ok=True)


class _Lines:
    """JSON lines."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a prediction."""
        self._file.write((json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode())

    def finish(self) -> None:
        """Write what is left."""


class _Csv(_Lines):
    """CSV: the answers of ``top`` after the first are columns ``answer_2``, ``score_2``, ...; other lists are JSON."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._columns: list[str] = []

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a row, the first one after the names of its columns."""
        values = {name: value for name, value in record.items() if name != "top"}
        for place, other in enumerate(record.get("top", ())[1:], start=2):
            values |= {f"{name}_{place}": value for name, value in other.items()}
        if not self._columns:
            self._begin([*values])
        self._row([self._cell(values.get(name)) for name in self._columns])

    def finish(self) -> None:
        """Write the names of columns, if there was no row."""
        if not self._columns:
            self._begin(["id", "answer", "score"])

    def _begin(self, columns: list[str]) -> None:
        self._columns = columns
        self._row(columns)

    @staticmethod
    def _cell(value: Any) -> Any:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | bool) else value

    def _row(self, cells: Sequence[Any]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        self._file.write(text.getvalue().encode())


class _Parquet(_Lines):
    """Parquet, in groups of rows."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._rows: list[Mapping[str, Any]] = []
        self._writer: Any = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Keep a row until there are enough for a group."""
        self._rows.append(record)
        if len(self._rows) == _GROUP:
            self._put()

    def finish(self) -> None:
        """Write the last group."""
        if self._rows or self._writer is None:
            self._put()
        self._writer.close()

    def _put(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._writer is None:
            usual = pa.schema([("id", pa.string()), ("answer", pa.string()), ("score", pa.float64())])
            schema = pa.Table.from_pylist(self._rows).schema if self._rows else usual
            self._writer = pq.ParquetWriter(self._file, schema)
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._writer.schema))
        self._rows.clear()


_FORMS = {".csv": _Csv, ".parquet": _Parquet}


def read_predictions(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a prediction file in order. Memory grows with the ids only.

    Raises:
        DataError: the file is missing, a line is not a prediction, or an id occurs twice.
    """
    if not path.is_file():
        raise DataError(f"prediction file {path} does not exist; write one with run_type=predict")
    seen: set[str] = set()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path} line {number}"
            try:
                record = parse_json(line.decode())
            except ValueError as error:
                found = line.decode(errors="replace").strip()[:60]
                raise DataError(f"{where} is not JSON ({found!r}); each line is {_FORM}") from error
            _check(record, where)
            if record["id"] in seen:
                raise DataError(f"{where} predicts '{record['id']}' a second time; keep one line an example")
            seen.add(record["id"])
            yield record


def _check(record: Any, where: str) -> None:
    """Raise DataError unless the record is a prediction."""
    if not isinstance(record, dict):
        raise DataError(f"{where} is a {type(record).__name__}, not an object; each line is {_FORM}")
    wrong = [
        name
        for name, valid in (("id", _is_text), ("answer", _is_answer), ("score", is_number))
        if not valid(record.get(name))
    ]
    if wrong:
        found = ", ".join(f"{name}={record.get(name)!r:.40}" for name in wrong)
        raise DataError(f"{where} has {found}; each line is {_FORM}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_answer(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))
