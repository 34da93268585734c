"""Accuracy on VCR: the answer, the rationale given the right answer, and both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from villa.batch import Batch
from villa.errors import DataError
from villa.evaluation.metrics import Metric
from villa.facts import CHOICES, VcrReference
from villa.models.base import ModelOutput
from villa.registry import register_metric


@register_metric("vcr")
class VcrAccuracy(Metric):
    """Q -> AR (``vcr``: both right), Q -> A (``vcr_answer``) and QA -> R (``vcr_rationale``).

    Expects logits ``[B * S, 2]`` with a choice's score in column 1. S is 8 (answers, then rationales given the right
    answer) or 20 (answers, then rationales given each answer). Rationales are always judged given the right answer, as
    on the leaderboard.
    """

    _sums: Tensor
    _count: int

    def __init__(self) -> None:
        self.reset()

    def update(self, output: ModelOutput, batch: Batch) -> None:
        """Add the batch's right choices."""
        references = batch.references or []
        if not all(isinstance(r, VcrReference) and None not in (r.answer, r.rationale) for r in references or [None]):
            raise DataError("metric 'vcr' needs VCR questions with answers; evaluate a split that has them")
        scores = output.logits.detach()[:, 1].reshape(len(references), -1)
        answers = torch.tensor([r.answer for r in references], device=scores.device)
        rationales = torch.tensor([r.rationale for r in references], device=scores.device)
        answered = scores[:, :CHOICES].argmax(1) == answers
        explained = given_answer(scores, answers).argmax(1) == rationales
        sums = torch.stack((answered & explained, answered, explained)).sum(1, dtype=torch.float64)
        self._sums = self._sums.to(sums.device) + sums
        self._count += len(references)

    def compute(self) -> dict[str, float]:
        """Return the three shares."""
        if not self._count:
            raise DataError("metric 'vcr': no examples were evaluated; is the split empty?")
        names = ("vcr", "vcr_answer", "vcr_rationale")
        return {name: total / self._count for name, total in zip(names, self._sums.tolist(), strict=True)}

    def reset(self) -> None:
        """Reset sums and count."""
        self._sums = torch.zeros(3, dtype=torch.float64)
        self._count = 0

    def state(self) -> Tensor:
        """Return the three sums and the count."""
        return torch.cat((self._sums, self._sums.new_tensor([self._count])))

    def load_states(self, states: Sequence[Tensor]) -> None:
        """Replace sums and count by their totals over ranks."""
        state = torch.stack(list(states)).sum(0)
        self._sums, self._count = state[:3], round(state[3].item())


def given_answer(scores: Tensor, answers: Tensor) -> Tensor:
    """Return the scores of the rationales given an answer.

    Args:
        scores: ``[B, 8]`` or ``[B, 20]``.
        answers: ``[B]``; ignored for 8 scores, whose rationales are those of the right answer.

    Returns:
        ``[B, 4]``.
    """
    rationales = scores[:, CHOICES:].unflatten(1, (-1, CHOICES))  # type: ignore[no-untyped-call]
    chosen: Tensor = rationales[torch.arange(len(scores)), answers if rationales.shape[1] > 1 else 0]
    return chosen
