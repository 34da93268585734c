"""The answers of a classification task, in the order of the logits."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from villa.errors import DataError
from villa.files import lines_of, read_json, read_text

logger = logging.getLogger(__name__)


def plain_answer(answer: str) -> str:
    """Return an answer as labels know it: without the white space around it.

    Nothing else of it is changed: case, punctuation and white space within are the user's.
    """
    return answer.strip()


def read_answers(path: Path) -> list[str]:
    """Read a list of answers, or an object ``{answer: label}`` as in the released ``ans2label.json``.

    Raises:
        DataError: the file is missing, lists an answer twice, or holds something else.
    """
    value = read_json(path, "list of answers", "give ans2label.json")
    if isinstance(value, dict):
        if sorted(map(repr, value.values())) != sorted(map(repr, range(len(value)))):
            raise DataError(f"'{path}' must give the labels 0 to {len(value) - 1}, each to one answer")
        value = sorted(value, key=value.__getitem__)
    if not (isinstance(value, list) and value and all(isinstance(answer, str) for answer in value)):
        raise DataError(f"'{path}' holds no answers; give a JSON list of texts, or an object {{answer: label}}")
    return _unique(value, path)


def read_answer_list(path: Path) -> list[str]:
    """Read the answers that are the labels of a user's own data: ``.json`` as ``read_answers``, else one a line.

    An empty line between two answers, or before the first, is the empty answer, as in VQA v2's list; where there are
    several, which cannot all be it, and at the end of the file, empty lines are passed over.

    Raises:
        DataError: the file cannot be read, holds none, or lists an answer twice.
    """
    if path.suffix == ".json":
        return _unique([plain_answer(answer) for answer in read_answers(path)], path)
    answers = _listed(read_text(path, "answers file", "give a text file with one answer a line"))
    if any("\r" in answer for answer in answers):
        raise DataError(f"'{path}' ends lines with carriage returns alone; end them with line feeds")
    empty = answers.count("")
    if empty > 1:
        logger.warning("%s: %d empty lines are passed over; a single one would be the empty answer", path, empty)
        answers = [answer for answer in answers if answer]
    elif empty:
        logger.warning("%s:%d: the empty line is taken for the empty answer", path, answers.index("") + 1)
    if not answers:
        raise DataError(f"the answers file '{path}' is empty; give every answer once, one a line")
    return _unique(answers, path)


def answer_list(path: Path, answers: Sequence[str]) -> str:
    """Return the contents of a file from which ``read_answer_list`` reads these answers.

    Args:
        path: its name; one that ends in ``.json`` is for a JSON list, others are for one answer a line.
        answers: without white space around them.

    Raises:
        DataError: lines cannot hold them: one has a line break in it, or the empty answer is the last one.
    """
    if path.suffix == ".json":
        return json.dumps(list(answers), ensure_ascii=False, indent=0) + "\n"
    text = "".join(f"{answer}\n" for answer in answers)
    if "\r" in text or _listed(text) != list(answers):
        raise DataError(f"'{path}' cannot hold these answers one a line; give it a name that ends in .json")
    return text


def best_answers(scores: Tensor, answers: Sequence[str]) -> list[dict[str, Any]]:
    """Return the best of the ``answers`` in every row of ``scores [rows, answers]``, with its score."""
    best, labels = scores.max(-1)
    pairs = zip(labels.tolist(), best.tolist(), strict=True)
    return [{"answer": answers[label], "score": score} for label, score in pairs]


def _listed(text: str) -> list[str]:
    """Return the lines of an answers file up to the last that is not empty."""
    answers = [plain_answer(line) for line in lines_of(text)]
    while answers and not answers[-1]:
        answers.pop()
    return answers


def _unique(answers: list[str], path: Path) -> list[str]:
    repeated = [answer for answer, count in Counter(answers).items() if count > 1]
    if repeated:
        raise DataError(f"the answers file '{path}' repeats '{repeated[0]}'; give every answer once")
    return answers
