"""Matching images and texts within a micro-batch, as dual encoders (CLIP, SigLIP) are trained."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from villa.batch import Batch
from villa.errors import DataError
from villa.losses.base import Loss, LossConfig
from villa.losses.classification import widened
from villa.losses.consistency import Reduction, symmetric_kl
from villa.models.base import ModelOutput
from villa.registry import register_loss


@dataclass
class ContrastiveConfig(LossConfig):
    """Options of the contrastive loss.

    Attributes:
        form: ``softmax`` over the texts for every image and over the images for every text (CLIP, arXiv 2103.00020),
            or ``sigmoid`` of every pair on its own (SigLIP, arXiv 2303.15343).
    """

    name: str = "contrastive"
    form: Literal["softmax", "sigmoid"] = "softmax"


@register_loss("contrastive")
class Contrastive(Loss):
    """Contrastive loss over all pairs of a micro-batch; several texts may be about one image."""

    Config: ClassVar[type[LossConfig]] = ContrastiveConfig
    config: ContrastiveConfig

    def forward(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean over examples.

        Args:
            output: with logits ``[B, B]``, images by texts.
            batch: with targets ``[B, B]``, 1 where the text is about the image. Where several are, the softmax is
                compared with the uniform distribution over them.

        Raises:
            DataError: there are no targets, or they do not say which pairs match.
        """
        logits, matches = widened(output.logits), self._matches(output.logits, batch)
        if self.config.form == "sigmoid":
            return -F.logsigmoid(logits * (2 * matches - 1)).sum(-1).mean()
        return (_soft_cross_entropy(logits, matches) + _soft_cross_entropy(logits.T, matches.T)) / 2

    def consistency(
        self, output: ModelOutput, clean: ModelOutput, batch: Batch, reduction: Reduction = "batchmean"
    ) -> Tensor:
        """Return the divergence of the distributions that the loss compares: over texts and images, or of each pair."""
        ours, theirs = output.logits, clean.logits
        if self.config.form == "sigmoid":
            divergence = symmetric_kl(_match_or_not(ours), _match_or_not(theirs), reduction)
            return divergence if reduction == "mean" else divergence * ours.shape[-1]
        return (symmetric_kl(ours, theirs, reduction) + symmetric_kl(ours.T, theirs.T, reduction)) / 2

    def compares_examples(self, objectives: Collection[str]) -> bool:
        """True: the texts and images of the others are those that do not match."""
        return True

    def _matches(self, logits: Tensor, batch: Batch) -> Tensor:
        targets = batch.targets
        if targets is None or targets.shape != logits.shape or not targets.is_floating_point():
            found = "none" if targets is None else f"{list(targets.shape)}"
            raise DataError(
                f"a contrastive loss needs targets [B, B], 1 where a text is about an image, not {found}; set "
                "dataset.target=pair, and a model that matches images and texts"
            )
        return targets.to(torch.promote_types(logits.dtype, torch.float32))


def _match_or_not(logits: Tensor) -> Tensor:
    """Logits ``[pairs, 2]`` whose softmax is the sigmoid of each, and its rest."""
    return torch.stack((logits, torch.zeros_like(logits)), dim=-1).flatten(0, 1)


def _soft_cross_entropy(logits: Tensor, matches: Tensor) -> Tensor:
    share = matches / matches.sum(-1, keepdim=True).clamp(min=1)
    return -(share * logits.log_softmax(-1)).sum(-1).mean()
