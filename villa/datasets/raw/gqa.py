"""GQA: questions about scene graphs, each with one answer."""

from __future__ import annotations

import mmap
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from villa.datasets.answers import plain_answer
from villa.datasets.raw.entries import read_entries
from villa.datasets.raw.example import RawExample, as_record


def read_gqa(questions: Path) -> Iterator[RawExample]:
    """Yield the questions of GQA, ``train_balanced_questions.json`` and its like: ``{id: question}``.

    They are read one after another, for the larger files have gigabytes. Questions of the test splits have no
    ``answer`` among their fields.

    Raises:
        DataError: the file cannot be read, or a record lacks a field.
    """
    for identifier, value in read_entries(questions):
        record = as_record(value, f"{questions}: question {identifier}")
        fields = {**record.values}
        if "answer" in fields:
            fields["answer"] = plain_answer(record.text("answer"))
        texts = {"input_ids": (record.text("question"),)}
        yield RawExample(identifier, texts, f"{record.text('imageId')}.npz", fields, record.where)


def count_gqa(questions: Path) -> int | None:
    """Return the number of questions of a file, or None where the file cannot be read."""
    try:
        with questions.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
            return sum(1 for _ in re.finditer(rb'"imageId"', contents))
    except (OSError, ValueError):  # an empty file cannot be mapped
        return None


def gqa_answers(files: Iterable[Path]) -> list[str]:
    """Return the answers of question files, the most frequent first, equal ones in alphabetical order."""
    counts = Counter(
        example.fields["answer"] for file in files for example in read_gqa(file) if "answer" in example.fields
    )
    return sorted(counts, key=lambda answer: (-counts[answer], answer))
