"""The answers of a classification task, in the order of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from villa.errors import DataError
from villa.files import read_json


def read_answers(path: Path) -> list[str]:
    """Read a list of answers, or an object ``{answer: label}`` as in the released ``ans2label.json``.

    Raises:
        DataError: the file is missing or holds something else.
    """
    value = read_json(path, "list of answers", "give ans2label.json")
    if isinstance(value, dict):
        if sorted(map(repr, value.values())) != sorted(map(repr, range(len(value)))):
            raise DataError(f"'{path}' must give the labels 0 to {len(value) - 1}, each to one answer")
        value = sorted(value, key=value.__getitem__)
    if not (isinstance(value, list) and value and all(isinstance(answer, str) for answer in value)):
        raise DataError(f"'{path}' holds no answers; give a JSON list of texts, or an object {{answer: label}}")
    return value


def best_answers(scores: Tensor, answers: Sequence[str]) -> list[dict[str, Any]]:
    """Return the best of the ``answers`` in every row of ``scores [rows, answers]``, with its score."""
    best, labels = scores.max(-1)
    pairs = zip(labels.tolist(), best.tolist(), strict=True)
    return [{"answer": answers[label], "score": score} for label, score in pairs]
