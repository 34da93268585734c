"""Margin losses on sigmoid scores: image-text retrieval and referring expressions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from villa.batch import Batch
from villa.errors import ConfigError
from villa.losses.base import Loss, LossConfig
from villa.losses.classification import class_indices, widened
from villa.models.base import ModelOutput
from villa.registry import register_loss


@dataclass
class MarginConfig(LossConfig):
    """Options of the margin losses.

    Attributes:
        margin: margin between the sigmoid scores of right and wrong pairs, in (0, 1].
    """

    name: str = "margin_ranking"
    margin: float = 0.2

    def check(self) -> None:
        """Refuse a margin outside (0, 1]."""
        if not 0 < self.margin <= 1:
            raise ConfigError(f"loss.margin={self.margin} is not allowed; give a number in (0, 1]")


@dataclass
class RegionRankingConfig(MarginConfig):
    """Options of the margin loss on regions.

    Attributes:
        hard_ratio: share of examples whose negative is the wrong region with the highest score; others draw any.
    """

    name: str = "region_ranking"
    hard_ratio: float = 0.3

    def check(self) -> None:
        """Check the ranges of the options."""
        super().check()
        if not 0 <= self.hard_ratio <= 1:
            raise ConfigError(f"loss.hard_ratio={self.hard_ratio} is not allowed; give a share in [0, 1]")


@register_loss("margin_ranking")
class MarginRanking(Loss):
    """max(margin + s(wrong) - s(right), 0), averaged over all wrong pairs of all examples (retrieval)."""

    Config: ClassVar[type[LossConfig]] = MarginConfig
    config: MarginConfig

    def forward(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean over the S - 1 wrong pairs of ``logits [B, S]``; targets are the indices of right pairs."""
        scores = widened(output.logits).sigmoid()
        targets = class_indices(batch, scores).unsqueeze(1)
        right = scores.gather(1, targets)
        terms = (self.config.margin + scores - right).clamp(min=0)
        wrong = torch.ones_like(terms).scatter(1, targets, 0)
        return (terms * wrong).sum() / wrong.sum().clamp(min=1)


@register_loss("region_ranking")
class RegionRanking(Loss):
    """max(margin + s(wrong) - s(right), 0) with one negative region per example, averaged over examples."""

    Config: ClassVar[type[LossConfig]] = RegionRankingConfig
    config: RegionRankingConfig

    def forward(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean over rows of ``logits [B, R]``, with negatives drawn from torch's generator."""
        logits = widened(output.logits)
        targets = class_indices(batch, logits)
        return self.terms(logits, targets, self.negatives(logits.detach(), targets, batch)).mean()

    def terms(self, logits: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
        """Return the loss ``[B]`` of right and negative regions ``[B]``; 0 for a row whose only region is right."""
        scores = logits.sigmoid()
        right, wrong = (scores.gather(1, index.unsqueeze(1)).squeeze(1) for index in (targets, negatives))
        return (self.config.margin + wrong - right).clamp(min=0) * (negatives != targets)

    def negatives(self, logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        """Draw a negative region ``[B]`` per row: the best-scored with probability ``hard_ratio``, else any."""
        allowed = torch.ones_like(logits, dtype=torch.bool) if batch.region_mask is None else batch.region_mask.clone()
        allowed.scatter_(1, targets.unsqueeze(1), False)
        hardest = logits.masked_fill(~allowed, -torch.inf).argmax(1)
        alone = ~allowed.any(1)
        weights = torch.where(alone.unsqueeze(1), torch.ones_like(logits), allowed.to(logits.dtype))
        any_wrong = torch.multinomial(weights, 1).squeeze(1)
        hard = torch.rand(len(logits), device=logits.device) < self.config.hard_ratio
        return torch.where(alone, targets, torch.where(hard, hardest, any_wrong))
