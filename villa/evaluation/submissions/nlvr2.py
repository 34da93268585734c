"""NLVR2: the table that its authors' evaluation script reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from villa.errors import DataError
from villa.evaluation.submissions.csv_table import CsvSubmission, checked_id
from villa.registry import register_submission


@register_submission("nlvr2")
class Nlvr2Submission(CsvSubmission):
    """NLVR2: CSV without a header, rows ``identifier,True`` or ``identifier,False``.

    The evaluation script of github.com/lil-lab/nlvr takes every line for a prediction and knows no quotes.
    """

    name = "nlvr2"
    description = "CSV file without a header, rows identifier,True or identifier,False"
    columns = ("identifier", "prediction")
    header = False

    def convert(self, record: Mapping[str, Any], where: str) -> list[str]:
        """The answer of a prediction is ``True`` or ``False``, as text."""
        return [record["id"], str(record["answer"])]

    def check(self, entry: list[str], where: str) -> str:
        """Check both columns; return the identifier."""
        identifier, prediction = entry
        if prediction not in ("True", "False"):
            raise DataError(f"{where} predicts {prediction!r:.60}; it must be True or False")
        return checked_id(identifier, "identifier", where)
