"""NLVR2: sentences about two photographs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from villa.datasets.raw.example import LineRecords, RawExample, Record
from villa.errors import DataError

_LABELS = {"True": 1, "true": 1, "False": 0, "false": 0}


def read_nlvr2(annotations: Path) -> Iterator[RawExample]:
    """Yield the sentences of an NLVR2 file, ``train.json`` and its like: one JSON object a line.

    ``target`` is 1 for True, 0 for False, None where the label is hidden.

    Raises:
        DataError: a record has no ``identifier`` or ``sentence``, or another label.
    """
    for record in LineRecords(annotations):
        identifier = record.text("identifier")
        pair, dash, _ = identifier.rpartition("-")  # the last part numbers the sentences of a pair of images
        if not dash:
            raise DataError(f"{record.where}: identifier '{identifier}' has no '-'; it must be like 'dev-850-0-0'")
        images = [f"nlvr2_{pair}-img{side}.npz" for side in (0, 1)]
        fields: dict[str, Any] = {**record.values, "target": _target(record)}
        yield RawExample(identifier, {"input_ids": (record.text("sentence"),)}, images, fields, record.where)


def _target(record: Record) -> int | None:
    label = record.values.get("label")
    if label is None:
        return None
    if str(label) not in _LABELS:
        raise DataError(f"{record.where}: label {label!r:.40} must be True or False")
    return _LABELS[str(label)]
