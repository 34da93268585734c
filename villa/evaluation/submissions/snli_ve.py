"""SNLI-VE: labels of image-sentence pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from villa.evaluation.submissions.json_list import JsonSubmission, checked_field, is_id
from villa.registry import register_submission

LABELS = ("contradiction", "entailment", "neutral")
_FORM = " or ".join((", ".join(LABELS[:-1]), LABELS[-1]))


@register_submission("snli_ve")
class SnliVeSubmission(JsonSubmission):
    """SNLI-VE: JSON list of ``{"id": text, "label": entailment | neutral | contradiction}``.

    The task has no leaderboard: this form is villa's own, for exchange and for scoring elsewhere.
    """

    name = "snli_ve"
    description = 'JSON list of {"id": text, "label": "contradiction", "entailment" or "neutral"}'

    def convert(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The answer of a prediction is the label."""
        return {"id": record["id"], "label": checked_field(record, "answer", _is_label, _FORM, where)}

    def check(self, entry: dict[str, Any], where: str) -> str:
        """Check both fields; return the id."""
        checked_field(entry, "label", _is_label, _FORM, where)
        return str(checked_field(entry, "id", is_id, "a text that is not empty", where))


def _is_label(value: Any) -> bool:
    return isinstance(value, str) and value in LABELS
