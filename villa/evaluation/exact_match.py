"""Whole answers of models that write."""

from __future__ import annotations

import torch

from villa.batch import Batch
from villa.errors import DataError
from villa.evaluation.metrics import MeanScore
from villa.models.base import ModelOutput
from villa.registry import register_metric


@register_metric("exact_match")
class ExactMatch(MeanScore):
    """Share of examples whose answer the model writes word for word when it always takes the likeliest token.

    No text is generated for it: every token is the likeliest after the true ones before it exactly when greedy
    decoding writes the answer, its end included. Logits are ``[N, vocabulary]``, targets ``[N]``.
    """

    name = "exact_match"

    def update(self, output: ModelOutput, batch: Batch) -> None:
        """Add the batch's scores."""
        mask, targets = batch.answer_mask, batch.targets
        if mask is None or targets is None or targets.numel() != len(output.logits):
            raise DataError(
                f"metric 'exact_match' needs the tokens of an answer for each example (first: '{batch.ids[0]}'); set "
                "dataset.target=text, and a model that writes"
            )
        wrong = (output.logits.detach().argmax(-1) != targets.flatten()).long()
        rows = mask.nonzero()[:, 0]
        mistakes = torch.zeros(len(batch), dtype=torch.long, device=rows.device).index_add(0, rows, wrong)
        self.add(mistakes == 0)
