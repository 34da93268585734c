"""What the loop lends a trainer: forward and backward passes of one micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from villa.adversarial.injection import inject
from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.engine.precision import Precision
from villa.engine.rng import derive_seed, seed_pass
from villa.losses.base import Loss
from villa.losses.consistency import Reduction
from villa.models.base import Model, ModelOutput, Point


class ModelPasses:
    """``villa.trainers.base.Passes`` on one process.

    Args:
        model: the model to run.
        loss: the task loss.
        precision: autocast and loss scaling.
        seed: the run's seed; dropout and random starts derive from (seed, rank, update, micro-batch, pass).
        rank: of this process.

    Attributes:
        losses: micro-batch number and detached value of every loss that was back-propagated in this update.
    """

    def __init__(self, model: Model, loss: Loss, precision: Precision, seed: int, rank: int = 0) -> None:
        self.model = model
        self.loss_function = loss
        self.precision = precision
        self.points: Mapping[str, Point] = model.perturbation_points()
        self.losses: list[tuple[int, Tensor]] = []
        self._key = (seed, rank)
        self._update = self._micro_batch = 0
        self._weight = 1.0

    def begin(self, update: int, micro_batch: int, weight: float) -> None:
        """Turn to a micro-batch; every loss of it is multiplied by ``weight``."""
        if micro_batch == 0:
            self.losses.clear()
        self._update, self._micro_batch, self._weight = update, micro_batch, weight

    @property
    def gradient_scale(self) -> float:
        """Loss scale x micro-batch weight."""
        return self.precision.loss_scale * self._weight

    def seed(self, name: str) -> int:
        """A seed for the draws called ``name`` of this micro-batch."""
        return derive_seed(*self._key, self._update, self._micro_batch, name)

    def forward(
        self,
        batch: Batch,
        perturbations: Mapping[str, Perturbation] | None = None,
        *,
        index: int = 0,
        grad: bool = True,
    ) -> ModelOutput:
        """Run the model with the perturbations added at their points; logits come in fp32 or wider."""
        seed_pass(*self._key, self._update, self._micro_batch, index)
        injected = inject(self.model, self.points, perturbations, batch) if perturbations else nullcontext()
        with torch.set_grad_enabled(grad), injected:
            return self.precision.run(self.model, batch)

    def loss(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean task loss of the micro-batch."""
        value: Tensor = self.loss_function(output, batch)
        return value

    def consistency(self, output: ModelOutput, clean: ModelOutput, batch: Batch, reduction: Reduction) -> Tensor:
        """Return the divergence of the predictions from those on clean inputs, as the loss defines it."""
        return self.loss_function.consistency(output, clean, batch, reduction)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Back-propagate the scaled, weighted loss; ``last`` matters only where processes share gradients."""
        self.losses.append((self._micro_batch, loss.detach()))
        torch.autograd.backward(self.precision.scaler.scale(loss * self._weight))
