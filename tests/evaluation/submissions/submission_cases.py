"""A prediction of each task, and helpers to write files and to read errors."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from villa.errors import DataError
from villa.evaluation.submissions.base import Submission
from villa.registry import SUBMISSIONS

#: Four answers, then four rationales given each of them.
PROBABILITIES = [0.1, 0.2, 0.3, 0.4, *[0.25] * 8, 1, 0, 0.0, 0, 0.5, 0.5, 0, 1e-9]

#: Two predictions of each task.
PREDICTIONS: dict[str, list[dict[str, Any]]] = {
    "vqa": [{"id": "262144000", "answer": "café"}, {"id": "0", "answer": ""}],
    "gqa": [{"id": "07354", "answer": "on the left"}, {"id": "x1", "answer": "no"}],
    "snli_ve": [{"id": "4.jpg#0r1e", "answer": "entailment"}, {"id": "2", "answer": "neutral"}],
    "nlvr2": [{"id": "test1-0-0-1", "answer": "True"}, {"id": "test1-0-1-1", "answer": "False"}],
    "vcr": [{"id": f"test-{n}", "answer": 3, "probabilities": PROBABILITIES} for n in range(2)],
    "referring": [{"id": "17", "answer": "4", "box": [0, 1.5, 20, 0.25]}, {"id": "18", "answer": 0, "box": [1] * 4}],
    "retrieval": [
        {"id": "t1|0", "text": "t1", "answer": "b", "images": ["b", "a"], "scores": [2, 1.5]},
        {"id": "t2|0", "text": "t2", "answer": "a", "images": ["a"], "scores": [-0.5]},
        {"id": "t2|1", "text": "t2", "answer": "b", "images": ["b"], "scores": [1e-3]},
    ],
}
#: Ids of these entries.
IDS = {
    "vqa": ["262144000", "0"],
    "gqa": ["07354", "x1"],
    "snli_ve": ["4.jpg#0r1e", "2"],
    "nlvr2": ["test1-0-0-1", "test1-0-1-1"],
    "vcr": ["test-0", "test-1"],
    "referring": ["17", "18"],
    "retrieval": ["t1", "t2"],
}


def submission(task: str) -> Submission:
    return SUBMISSIONS.get(task)()  # type: ignore[no-any-return]


def write_predictions(folder: Path, records: Iterable[dict[str, Any]]) -> Path:
    path = folder / "predictions.jsonl"
    path.write_text("".join(json.dumps({"score": 0.5, **record}) + "\n" for record in records))
    return path


def write_submission(folder: Path, task: str) -> Path:
    """Write the two predictions of a task as a submission."""
    output = folder / f"{task}{submission(task).suffix}"
    submission(task).write(write_predictions(folder, PREDICTIONS[task]), output)
    return output


def problem(task: str, file: Path, ids: list[str] | None = None) -> str:
    """Return the one line that the validator finds fault with."""
    with pytest.raises(DataError) as error:
        submission(task).validate(file, ids)
    message = str(error.value)
    assert "\n" not in message
    return message
