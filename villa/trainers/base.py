"""What an adversarial method ("trainer") owes the loop, and what the loop lends it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.losses.base import Reduction
from villa.models.base import ModelOutput

#: Detached values to log, by name; a trainer prefixes per-pass values with ``pass<t>/``.
Logs = dict[str, Tensor]


@dataclass
class TrainerConfig:
    """Options that every trainer has: its registered name."""

    name: str = "standard"


class Passes(Protocol):
    """What the loop lends a trainer for one micro-batch.

    It owns autocast, gradient scaling, accumulation, gradient synchronisation and the random state.
    """

    @property
    def gradient_scale(self) -> float:
        """Factor by which every gradient is scaled at present (loss scale x micro-batch weight)."""

    def seed(self, name: str) -> int:
        """A seed for the draws called ``name`` of this micro-batch."""

    def forward(
        self,
        batch: Batch,
        perturbations: Mapping[str, Perturbation] | None = None,
        *,
        index: int = 0,
        grad: bool = True,
    ) -> ModelOutput:
        """Run the model, with perturbations added at their points.

        Args:
            batch: the micro-batch.
            perturbations: by modality; created on their first pass, inside the model's own forward.
            index: names the random state: equal indices get equal dropout masks.
            grad: False runs without an autograd graph.
        """

    def loss(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean task loss of the micro-batch."""

    def consistency(self, output: ModelOutput, clean: ModelOutput, batch: Batch, reduction: Reduction) -> Tensor:
        """Return the divergence of the predictions from those on clean inputs, as the loss defines it."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Back-propagate. ``last`` marks the micro-batch's last backward: gradients may be reduced then."""


class Trainer(ABC):
    """An adversarial method: which passes run on which perturbations, and what is back-propagated."""

    Config: ClassVar[type[TrainerConfig]] = TrainerConfig
    config: TrainerConfig

    def __init__(self, config: Any = None) -> None:
        self.config = config if config is not None else self.Config()

    @abstractmethod
    def step(self, batch: Batch, passes: Passes) -> Logs:
        """Run all passes of one micro-batch; return detached values to log, with ``loss`` among them."""

    @abstractmethod
    def cost(self) -> tuple[int, int]:
        """Forward and backward passes of one micro-batch (a backward costs about two forwards)."""

    def cost_of(self, objective: str) -> tuple[int, int]:
        """Forward and backward passes of a micro-batch of an objective of pre-training; by default as of any other."""
        return self.cost()

    def relative_cost(self, objectives: Mapping[str, float] | None = None) -> float:
        """Cost relative to standard training, a backward counting as two forwards.

        Args:
            objectives: of a mixture, with how often an update is of each: the cost is the mean over updates.
        """
        weights = objectives or {}
        costs = [(self.cost_of(name), weight) for name, weight in weights.items()] or [(self.cost(), 1.0)]
        total = sum(weight * (forwards + 2 * backwards) / 3 for (forwards, backwards), weight in costs)
        return total / sum(weight for _, weight in costs)

    def modalities(self) -> tuple[str, ...]:
        """The modalities that are perturbed, to check against the model's points before training."""
        return ()
