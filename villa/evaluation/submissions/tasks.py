"""The submission formats of tasks: VQA, GQA, NLVR2, SNLI-VE, referring expressions, VCR."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from villa.errors import DataError
from villa.evaluation.submissions.formats import (
    CsvSubmission,
    JsonSubmission,
    checked_field,
    checked_id,
    is_id,
    is_text,
    is_whole,
    text_answer,
    whole_id,
)
from villa.facts import CHOICES
from villa.json_values import is_number
from villa.registry import register_submission


@register_submission("vqa")
class VqaSubmission(JsonSubmission):
    """VQA v2: JSON list of ``{"question_id": whole number, "answer": text}``.

    The results format of visualqa.org/evaluation.html. The server requires every question of the split.
    """

    name = "vqa"
    description = 'JSON list of {"question_id": whole number, "answer": text}'

    def convert(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Convert a prediction whose id is the number of the question."""
        return {"question_id": whole_id(record, where), "answer": text_answer(record, where)}

    def check(self, entry: dict[str, Any], where: str) -> str:
        """Check both fields; return the question's number as text."""
        question = checked_field(entry, "question_id", is_whole, "a whole number", where)
        checked_field(entry, "answer", is_text, "a text", where)
        return str(question)


@register_submission("gqa")
class GqaSubmission(JsonSubmission):
    """GQA: JSON list of ``{"questionId": text, "prediction": text}``.

    The format of the challenge's evaluation script. Ids are strings, although most look like numbers.
    """

    name = "gqa"
    description = 'JSON list of {"questionId": text, "prediction": text}'

    def convert(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Convert a prediction whose id is that of the question."""
        return {"questionId": record["id"], "prediction": text_answer(record, where)}

    def check(self, entry: dict[str, Any], where: str) -> str:
        """Check both fields; return the id."""
        question = checked_field(entry, "questionId", is_id, "a text that is not empty", where)
        checked_field(entry, "prediction", is_text, "a text", where)
        return str(question)


@register_submission("nlvr2")
class Nlvr2Submission(CsvSubmission):
    """NLVR2: CSV without a header, rows ``identifier,True`` or ``identifier,False``.

    The evaluation script of github.com/lil-lab/nlvr reads every line as a prediction and does not support quotes.
    """

    name = "nlvr2"
    description = "CSV file without a header, rows identifier,True or identifier,False"
    columns = ("identifier", "prediction")
    header = False

    def convert(self, record: Mapping[str, Any], where: str) -> list[str]:
        """Convert a prediction whose answer is ``True`` or ``False``."""
        return [record["id"], str(record["answer"])]

    def check(self, entry: list[str], where: str) -> str:
        """Check both columns; return the identifier."""
        identifier, prediction = entry
        if prediction not in ("True", "False"):
            raise DataError(f"{where} predicts {prediction!r:.60}; it must be True or False")
        return checked_id(identifier, "identifier", where)


LABELS = ("contradiction", "entailment", "neutral")
_SNLI_VE_FORM = " or ".join((", ".join(LABELS[:-1]), LABELS[-1]))


@register_submission("snli_ve")
class SnliVeSubmission(JsonSubmission):
    """SNLI-VE: JSON list of ``{"id": text, "label": entailment | neutral | contradiction}``.

    The task has no leaderboard: this format is villa's own, for exchange and for scoring elsewhere.
    """

    name = "snli_ve"
    description = 'JSON list of {"id": text, "label": "contradiction", "entailment" or "neutral"}'

    def convert(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Convert a prediction whose answer is the label."""
        return {"id": record["id"], "label": checked_field(record, "answer", _is_label, _SNLI_VE_FORM, where)}

    def check(self, entry: dict[str, Any], where: str) -> str:
        """Check both fields; return the id."""
        checked_field(entry, "label", _is_label, _SNLI_VE_FORM, where)
        return str(checked_field(entry, "id", is_id, "a text that is not empty", where))


def _is_label(value: Any) -> bool:
    return isinstance(value, str) and value in LABELS


_BOX_FORM = "[x, y, width, height] in pixels, four numbers with width and height above 0"


@register_submission("referring")
class ReferringSubmission(JsonSubmission):
    """RefCOCO, RefCOCO+, RefCOCOg: JSON list of ``{"sent_id": whole number, "box": [x, y, w, h]}`` in pixels.

    These data sets have no leaderboard: this format is villa's own, with sentence ids and boxes as in the annotations.
    """

    name = "referring"
    description = 'JSON list of {"sent_id": whole number, "box": [x, y, width, height]} in pixels'

    def convert(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Convert a prediction whose id is the number of the sentence, with a field ``box``."""
        return {"sent_id": whole_id(record, where), "box": checked_field(record, "box", _is_box, _BOX_FORM, where)}

    def check(self, entry: dict[str, Any], where: str) -> str:
        """Check both fields; return the number as text."""
        checked_field(entry, "box", _is_box, _BOX_FORM, where)
        return str(checked_field(entry, "sent_id", is_whole, "a whole number", where))


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value)) and min(value[2:]) > 0


#: The answers, then the rationales given each answer.
GROUPS = ("answer", *(f"rationale_conditioned_on_a{answer}" for answer in range(CHOICES)))
PROBABILITIES = tuple(f"{group}_{choice}" for group in GROUPS for choice in range(CHOICES))
#: Largest difference of a group's sum from 1.
TOLERANCE = 1e-3

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_VCR_FORM = f"{len(PROBABILITIES)} numbers: {CHOICES} answers, then {CHOICES} rationales given each answer"


@register_submission("vcr")
class VcrSubmission(CsvSubmission):
    """VCR: CSV with a header, ``annot_id`` and 20 probabilities: of 4 answers, then of 4 rationales given each answer.

    The columns of the leaderboard of visualcommonsense.com, see models/README.md of github.com/rowanz/r2c.
    """

    name = "vcr"
    description = "CSV file with a header, annot_id and 20 probabilities a row"
    columns = ("annot_id", *PROBABILITIES)
    header = True

    def convert(self, record: Mapping[str, Any], where: str) -> list[str]:
        """Convert a prediction with the 20 ``probabilities`` in the order of the columns."""
        values = checked_field(record, "probabilities", _are_probabilities, _VCR_FORM, where)
        return [record["id"], *(repr(float(value)) for value in values)]

    def check(self, entry: list[str], where: str) -> str:
        """Check the id, each number, and the sum of each group; return the id."""
        numbers = [_number(text, name, where) for text, name in zip(entry[1:], PROBABILITIES, strict=True)]
        for index, group in enumerate(GROUPS):
            total = sum(numbers[index * CHOICES : (index + 1) * CHOICES])
            if abs(total - 1) > TOLERANCE:
                columns = f"{group}_0 to {group}_{CHOICES - 1}"
                raise DataError(f"{where}: columns {columns} sum to {total:.4f}; probabilities must sum to 1")
        return checked_id(entry[0], "annot_id", where)


def _number(text: str, column: str, where: str) -> float:
    number = float(text) if _NUMBER.fullmatch(text) else -1.0
    if not 0 <= number <= 1:
        raise DataError(f"{where}: column {column} is {text!r:.40}; it must be a number in [0, 1]")
    return number


def _are_probabilities(value: Any) -> bool:
    return isinstance(value, list) and len(value) == len(PROBABILITIES) and all(map(is_number, value))
