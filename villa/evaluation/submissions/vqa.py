"""VQA: the answers that the VQA challenge's server on EvalAI takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from villa.evaluation.submissions.json_list import (
    JsonSubmission,
    checked_field,
    is_text,
    is_whole,
    text_answer,
    whole_id,
)
from villa.registry import register_submission


@register_submission("vqa")
class VqaSubmission(JsonSubmission):
    """VQA v2: JSON list of ``{"question_id": whole number, "answer": text}``.

    The results format of visualqa.org/evaluation.html. The server wants every question of the split at once.
    """

    name = "vqa"
    description = 'JSON list of {"question_id": whole number, "answer": text}'

    def convert(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The id of a prediction spells the question's number."""
        return {"question_id": whole_id(record, where), "answer": text_answer(record, where)}

    def check(self, entry: dict[str, Any], where: str) -> str:
        """Check both fields; return the number as text."""
        question = checked_field(entry, "question_id", is_whole, "a whole number", where)
        checked_field(entry, "answer", is_text, "a text", where)
        return str(question)
