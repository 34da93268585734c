"""What a loss owes the rest of villa."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from villa.batch import Batch
from villa.losses.consistency import Reduction, symmetric_kl
from villa.models.base import ModelOutput


@dataclass
class LossConfig:
    """Options that every loss has: its registered name."""

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
            DataError: the batch has no targets, or targets of the wrong form.
        """

    def consistency(
        self, output: ModelOutput, clean: ModelOutput, batch: Batch, reduction: Reduction = "batchmean"
    ) -> Tensor:
        """Return how far the predictions are from those on clean inputs: the L_kl of VILLA.

        Args:
            output: on perturbed inputs.
            clean: on clean inputs; its logits and extras may be read, and gradients flow into both outputs.
            batch: what both were computed from.
            reduction: see ``symmetric_kl``.
        """
        return symmetric_kl(output.logits, clean.logits, reduction)

    def compares_examples(self, objectives: Collection[str]) -> bool:
        """Whether an example's loss depends on which others share its micro-batch.

        How updates are cut into micro-batches is then a part of the method.

        Args:
            objectives: those that batches name.
        """
        return False

    def count(self, batch: Batch) -> int:
        """Number of elements that ``forward`` averages over: weights micro-batches within an update."""
        return len(batch)
