"""Referring expressions: the box that each sentence means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from villa.evaluation.submissions.json_list import JsonSubmission, checked_field, is_whole, whole_id
from villa.json_values import is_number
from villa.registry import register_submission

_FORM = "[x, y, width, height] in pixels, four numbers with width and height above 0"


@register_submission("referring")
class ReferringSubmission(JsonSubmission):
    """RefCOCO, RefCOCO+, RefCOCOg: JSON list of ``{"sent_id": whole number, "box": [x, y, w, h]}`` in pixels.

    These data sets have no leaderboard: this form is villa's own, with the sentence ids and boxes of their annotations.
    """

    name = "referring"
    description = 'JSON list of {"sent_id": whole number, "box": [x, y, width, height]} in pixels'

    def convert(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The id of a prediction spells the sentence's number; its field ``box`` is taken as it is."""
        return {"sent_id": whole_id(record, where), "box": checked_field(record, "box", _is_box, _FORM, where)}

    def check(self, entry: dict[str, Any], where: str) -> str:
        """Check both fields; return the number as text."""
        checked_field(entry, "box", _is_box, _FORM, where)
        return str(checked_field(entry, "sent_id", is_whole, "a whole number", where))


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value)) and min(value[2:]) > 0
