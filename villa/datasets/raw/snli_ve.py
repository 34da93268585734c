"""SNLI-VE: does a photograph entail a sentence?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from villa.datasets.raw.example import LineRecords, RawExample
from villa.datasets.raw.karpathy import flickr_name
from villa.errors import DataError, nearest

#: Class indices of the released code.
CLASSES = {"contradiction": 0, "entailment": 1, "neutral": 2}
_NO_AGREEMENT = "-"


def read_snli_ve(annotations: Path) -> Iterator[RawExample]:
    """Yield the hypotheses of ``snli_ve_<split>.jsonl``; those whose annotators did not agree ("-") are left out.

    Raises:
        DataError: a record lacks a field or has another label.
    """
    for record in LineRecords(annotations):
        label = record.text("gold_label")
        if label == _NO_AGREEMENT:
            continue
        if label not in CLASSES:
            raise DataError(
                f"{record.where}: gold_label '{label}' must be {', '.join(CLASSES)}{nearest(label, CLASSES)}"
            )
        # The first release spells the field "Flikr30kID" and writes "4705552913.jpg".
        photograph = record.text("Flickr30K_ID", "Flikr30kID")
        fields: dict[str, Any] = {**record.values, "target": {"labels": [CLASSES[label]], "scores": [1.0]}}
        texts = {"input_ids": (record.text("sentence2"),)}
        yield RawExample(record.text("pairID"), texts, flickr_name(photograph, record.where), fields, record.where)
