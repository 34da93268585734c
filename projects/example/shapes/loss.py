"""Focal loss (Lin et al., ICCV 2017): cross-entropy that turns away from easy examples."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from villa.batch import Batch
from villa.losses.base import Loss, LossConfig
from villa.models.base import ModelOutput
from villa.registry import register_loss


@dataclass
class FocalConfig(LossConfig):
    """Options: gamma, how fast easy examples lose their weight; 0 is cross-entropy."""

    gamma: float = 2.0


@register_loss("focal")
class FocalLoss(Loss):
    """Mean over examples of (1 - p)^gamma x -log p, p being the probability of the right label."""

    Config = FocalConfig

    def forward(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean over ``logits [B, labels]`` and class indices ``[B]``."""
        assert batch.targets is not None
        nll = F.cross_entropy(output.logits.float(), batch.targets, reduction="none")
        return ((1 - (-nll).exp()) ** self.config.gamma * nll).mean()
