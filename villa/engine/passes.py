"""What the loop lends a trainer: forward and backward passes of one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from villa.adversarial.injection import inject
from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.distributed.blocks import modes
from villa.distributed.strategy import Strategy
from villa.losses.base import Loss, Reduction
from villa.losses.classification import widened
from villa.models.base import Model, ModelOutput, Point
from villa.rng import micro_batch_seed, seed_pass
from villa.share import Turn

PrecisionName = Literal["fp32", "bf16", "fp16"]

#: The type that autocast runs matrix products in.
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Mixed precision of a run: autocast type and gradient scaler.

    Args:
        name: ``fp32`` (no autocast), ``bf16``, or ``fp16`` with dynamic loss scaling.
        device: where the model runs.
    """

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        self.device = device
        self.dtype = AUTOCAST.get(name)
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def run(self, model: Model, batch: Batch) -> ModelOutput:
        """Run the model under autocast; logits and the like come in fp32 or wider."""
        with self.autocast():
            output: ModelOutput = model(batch)
        return output.map_scores(widened)

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision as a context; nothing in fp32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    @property
    def loss_scale(self) -> float:
        """The present loss scale; 1 without a scaler."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else 1.0


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Context in which a model is in evaluation mode; afterwards every module is in the mode that it was in."""
    return modes([(module, False) for module in model.modules()])


class ModelPasses:
    """``villa.trainers.base.Passes`` of a process's micro-batches.

    Args:
        model: the model to run.
        loss: the task loss.
        precision: autocast and loss scaling.
        seed: the run's seed; dropout and random starts derive from (seed, update, micro-batch, pass), so that they are
            the same whichever process runs a micro-batch.
        strategy: sums up gradients over processes.

    Attributes:
        losses: place (among those of this process) and detached value of every loss of a micro-batch of its own that
            was back-propagated in this update.
        ascents: place, modality, and whether it was finite, of every gradient of a perturbation of a micro-batch of its
            own that ``gradient`` has computed in this update.
    """

    def __init__(
        self, model: Model, loss: Loss, precision: Precision, seed: int, strategy: Strategy | None = None
    ) -> None:
        self.model = model
        self.loss_function = loss
        self.precision = precision
        self.points: Mapping[str, Point] = model.perturbation_points()
        self.losses: list[tuple[int, Tensor]] = []
        self.ascents: list[tuple[int, str, Tensor]] = []
        self.strategy = strategy or Strategy()
        self._check = _go_on
        self._seed = seed
        self._update = self._place = 0
        self._turn = Turn(0)
        self._weight = 1.0
        self._last = True

    def begin(
        self,
        update: int,
        place: int,
        weight: float,
        *,
        turn: Turn | None = None,
        last: bool = True,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Turn to a micro-batch; every loss of it is multiplied by ``weight``.

        Args:
            update: the optimiser step, from 1.
            place: of the micro-batch among those that this process runs; 0 begins the update.
            weight: of the micro-batch in the update; 0 where another process answers for it.
            turn: its number in the update; by default ``place``.
            last: whether it is the last one that this process runs.
            check: called before every pass; what it raises abandons the update.
        """
        if place == 0:
            self.losses.clear()
            self.ascents.clear()
        self._check = check or _go_on
        self._update, self._place, self._weight = update, place, weight
        self._turn, self._last = turn or Turn(place), last

    @property
    def gradient_scale(self) -> float:
        """Loss scale x micro-batch weight; the loss scale where the weight, and so every gradient, is 0."""
        return self.precision.loss_scale * (self._weight or 1.0)

    def seed(self, name: str) -> int:
        """A seed for the draws called ``name`` of this micro-batch."""
        return micro_batch_seed(self._seed, self._update, self._turn.number, name)

    def forward(
        self,
        batch: Batch,
        perturbations: Mapping[str, Perturbation] | None = None,
        *,
        index: int = 0,
        grad: bool = True,
        train: bool = True,
    ) -> ModelOutput:
        """Run the model with the perturbations added at their points; logits come in fp32 or wider."""
        self._check()
        seed_pass(self._seed, self._update, self._turn.number, index)
        injected = inject(self.model, self.points, perturbations, batch) if perturbations else nullcontext()
        mode = nullcontext() if train else evaluating(self.model)
        with torch.set_grad_enabled(grad), mode, injected:
            return self.precision.run(self.model, batch)

    def loss(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean task loss of the micro-batch."""
        value: Tensor = self.loss_function(output, batch)
        return value

    def consistency(self, output: ModelOutput, clean: ModelOutput, batch: Batch, reduction: Reduction) -> Tensor:
        """Return the divergence of the predictions from those on clean inputs, as the loss defines it."""
        return self.loss_function.consistency(output, clean, batch, reduction)

    def gradient(self, loss: Tensor, perturbations: Mapping[str, Perturbation]) -> None:
        """Give perturbations, and nothing else, the gradient of ``loss``; see ``villa.trainers.base.Passes``."""
        deltas = [perturbation.trained() for perturbation in perturbations.values()]
        scale = self.precision.loss_scale
        gradients = self.strategy.gradient(loss * scale if scale != 1.0 else loss, deltas)
        if self._turn.own:
            self.losses.append((self._place, loss.detach()))
        for modality, delta, gradient in zip(perturbations, deltas, gradients, strict=True):
            if gradient is not None and self._turn.own:
                self.ascents.append((self._place, modality, gradient.isfinite().all()))
            delta.grad = gradient if gradient is None or scale == 1.0 else gradient / scale

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Back-propagate the scaled, weighted loss; with the ``last`` one of the update, processes sum up gradients."""
        if self._turn.own:
            self.losses.append((self._place, loss.detach()))
        with self.strategy.backward(reduce=last and self._last):
            torch.autograd.backward(self.precision.scaler.scale(loss * self._weight))


def _go_on() -> None:
    """Look for no signal."""
