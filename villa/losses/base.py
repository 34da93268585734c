"""The interface of losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from villa.batch import Batch
from villa.models.base import ModelOutput

Reduction = Literal["batchmean", "mean"]
#: Of perturbed p and clean q: ``symmetric`` is KL(p||q) + KL(q||p), ``forward`` KL(q||p) (VAT, TRADES), and ``reverse``
#: KL(p||q).
Direction = Literal["symmetric", "forward", "reverse"]


def divergence(
    logits: Tensor, clean_logits: Tensor, reduction: Reduction = "batchmean", direction: Direction = "symmetric"
) -> Tensor:
    """Return the Kullback-Leibler divergence of two softmax distributions (symmetric: the L_kl of VILLA's R_kl).

    Args:
        logits: ``[rows, labels]`` on perturbed inputs.
        clean_logits: ``[rows, labels]`` on clean inputs; gradients flow into both.
        reduction: ``batchmean`` sums over labels and averages over rows; ``mean`` averages over both, as the released
            code does for VCR (half of ``batchmean`` with two labels).
        direction: see ``Direction``.
    """
    log_p, log_q = F.log_softmax(logits, -1), F.log_softmax(clean_logits, -1)
    pairs = {"symmetric": ((log_q, log_p), (log_p, log_q)), "forward": ((log_p, log_q),), "reverse": ((log_q, log_p),)}
    kinds = [F.kl_div(given, target, reduction="none", log_target=True) for given, target in pairs[direction]]
    terms = kinds[0] if len(kinds) == 1 else kinds[0] + kinds[1]
    return terms.mean() if reduction == "mean" else terms.sum(-1).mean()


def yes_or_no(logits: Tensor) -> Tensor:
    """Return logits ``[entries, 2]`` whose softmax is (sigmoid, 1 - sigmoid) of each entry of ``logits [rows, n]``."""
    return torch.stack((logits, torch.zeros_like(logits)), dim=-1).flatten(0, 1)


@dataclass
class LossConfig:
    """Options shared by all losses: the registered name."""

    name: str = "cross_entropy"


class Loss(nn.Module, ABC):
    """A training loss: the mean over the elements of a micro-batch."""

    Config: ClassVar[type[LossConfig]] = LossConfig
    config: LossConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.config = config if config is not None else self.Config()

    @abstractmethod
    def forward(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return the scalar mean loss in float32 or wider.

        Raises:
            DataError: the batch has no targets, or targets of another form.
        """

    def consistency(
        self,
        output: ModelOutput,
        clean: ModelOutput,
        batch: Batch,
        reduction: Reduction = "batchmean",
        direction: Direction = "symmetric",
    ) -> Tensor:
        """Return the divergence of predictions from those on clean inputs (VILLA's L_kl).

        Args:
            output: output on perturbed inputs.
            clean: output on clean inputs; only its logits and extras may be read, and gradients flow into both.
            batch: the batch that both were computed from.
            reduction: see ``divergence``.
            direction: see ``Direction``; a loss whose methods ask for symmetric divergences alone may leave it out.
        """
        return divergence(output.logits, clean.logits, reduction, direction)

    def compares_examples(self, objectives: Collection[str]) -> bool:
        """Return whether an example's loss depends on the others of its micro-batch.

        If so, the cut of updates into micro-batches is part of the method.

        Args:
            objectives: objectives that batches name.
        """
        return False

    def count(self, batch: Batch) -> int:
        """Return the number of elements that ``forward`` averages over, the weight of a micro-batch in its update."""
        return len(batch)
