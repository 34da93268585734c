"""VCR: the table of probabilities that its leaderboard takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from villa.errors import DataError
from villa.evaluation.submissions.csv_table import CsvSubmission, checked_id
from villa.evaluation.submissions.json_list import checked_field
from villa.json_values import is_number
from villa.registry import register_submission

CHOICES = 4
#: The answers, then the rationales given each of the answers.
GROUPS = ("answer", *(f"rationale_conditioned_on_a{answer}" for answer in range(CHOICES)))
PROBABILITIES = tuple(f"{group}_{choice}" for group in GROUPS for choice in range(CHOICES))
#: How far the sum of a group may be from 1.
TOLERANCE = 1e-3

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_FORM = f"{len(PROBABILITIES)} numbers: {CHOICES} answers, then {CHOICES} rationales given each answer"


@register_submission("vcr")
class VcrSubmission(CsvSubmission):
    """VCR: CSV with a header, ``annot_id`` and 20 probabilities: of 4 answers, then of 4 rationales given each answer.

    The columns that the leaderboard of visualcommonsense.com asks for, see models/README.md of github.com/rowanz/r2c.
    """

    name = "vcr"
    description = "CSV file with a header, annot_id and 20 probabilities a row"
    columns = ("annot_id", *PROBABILITIES)
    header = True

    def convert(self, record: Mapping[str, Any], where: str) -> list[str]:
        """The field ``probabilities`` of a prediction holds the 20 numbers in the order of the columns."""
        values = checked_field(record, "probabilities", _are_probabilities, _FORM, where)
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
