"""Prediction files: JSON lines ``{"id": ..., "answer": ..., "score": ...}``, written and read as a stream."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from villa.errors import DataError
from villa.files import fsync, room_for
from villa.json_values import is_number, parse_json

_FORM = '{"id": text, "answer": text or whole number, "score": number}'


class PredictionWriter:
    """Writes predictions one batch at a time; the file gets its name when all are written.

    Used as a context manager: leaving the block normally puts the file in place; an error in it leaves an older file
    unchanged. Memory does not grow with the number of predictions.

    Args:
        path: the file; missing folders are created.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")

    def __enter__(self) -> PredictionWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._temporary.open("x", encoding="utf-8")
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
                self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with room_for(self.path), self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
            if error is None:
                self._temporary.replace(self.path)
                fsync(self.path.parent)
        finally:
            self._temporary.unlink(missing_ok=True)


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
