"""LXMERT's answer head for a task, out of the head over 9,500 answers that it was pre-trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from villa.errors import CheckpointError, DataError
from villa.files import read_json
from villa.models.weight_files import read_weights
from villa.models.weight_names import plain_names

_HEAD = "answer_head."
#: The parameters with a row for every answer.
_ROWS = ("logit_fc.3.weight", "logit_fc.3.bias")
_ARTICLES = ("a ", "an ", "the ")
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_SPELLINGS = {word: str(number) for number, word in enumerate(_NUMBERS, start=1)} | {"grey": "gray"}


def pretraining_answer(answer: str) -> str:
    """Spell an answer as in pre-training: lower case, no article, no full stop, digits up to 10, gray."""
    answer = answer.lower()
    if answer.endswith("."):
        answer = answer[:-1].strip()
    for article in _ARTICLES:
        if answer.startswith(article):
            answer = answer.removeprefix(article).strip()
    return _SPELLINGS.get(answer, answer)


def read_pretraining_answers(path: Path) -> list[str]:
    """Read the answers of pre-training, in the order of their labels: the released ``all_ans.json``.

    Raises:
        DataError: the file is missing or not a list of ``{"ans": text}``.
    """
    entries = read_json(path, "answers of pre-training", "give all_ans.json of LXMERT's release")
    listed = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    answers = [entry.get("ans") for entry in entries] if listed else []
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"'{path}' must be a JSON list of {{\"ans\": text}}; give all_ans.json of LXMERT's release")
    return answers


def with_answer_head(
    path: str | Path, pretrained: Sequence[str], answers: Sequence[str]
) -> tuple[dict[str, Tensor], int]:
    """Give pre-trained weights a head for the answers of a task, as the released code starts VQA and GQA.

    The row of an answer is that of the same answer in pre-training; an answer that pre-training did not have starts
    with zeros.

    Args:
        path: pre-trained weights.
        pretrained: answers of pre-training, in the order of the head's rows.
        answers: answers of the task, in the order of its labels.

    Returns:
        The weights with ``logit_fc`` in place of ``answer_head``, and how many answers have a row of pre-training.

    Raises:
        CheckpointError: the file has no such head, or one over another number of answers.
    """
    weights = plain_names(read_weights(path))
    head = {name.removeprefix(_HEAD): weights.pop(name) for name in list(weights) if name.startswith(_HEAD)}
    lacking = next((name for name in _ROWS if name not in head), None)
    if lacking:
        raise CheckpointError(f"'{path}' has no {_HEAD}{lacking}; give the weights of LXMERT's pre-training")
    if any(len(head[name]) != len(pretrained) for name in _ROWS):
        raise CheckpointError(
            f"the answer head of '{path}' is over {len(head[_ROWS[0]])} answers, but {len(pretrained)} are listed; "
            "give the all_ans.json of the same pre-training"
        )
    labels = {answer: label for label, answer in enumerate(pretrained)}
    found = [labels.get(pretraining_answer(answer)) for answer in answers]
    rows = torch.tensor([-1 if label is None else label for label in found])
    for name in _ROWS:
        taken = head[name][rows.clamp(min=0)]
        head[name] = taken * (rows >= 0).to(taken).view(-1, *[1] * (taken.dim() - 1))
    return weights | head, sum(label is not None for label in found)
