"""GQA: the answers that the GQA challenge's server on EvalAI takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from villa.evaluation.submissions.json_list import JsonSubmission, checked_field, is_id, is_text, text_answer
from villa.registry import register_submission


@register_submission("gqa")
class GqaSubmission(JsonSubmission):
    """GQA: JSON list of ``{"questionId": text, "prediction": text}``.

    The form that the challenge's evaluation script reads. Ids are texts, although most look like numbers.
    """

    name = "gqa"
    description = 'JSON list of {"questionId": text, "prediction": text}'

    def convert(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The id of a prediction is the question's."""
        return {"questionId": record["id"], "prediction": text_answer(record, where)}

    def check(self, entry: dict[str, Any], where: str) -> str:
        """Check both fields; return the id."""
        question = checked_field(entry, "questionId", is_id, "a text that is not empty", where)
        checked_field(entry, "prediction", is_text, "a text", where)
        return str(question)
