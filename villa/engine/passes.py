"""Forward and backward passes of one micro-batch, as a trainer runs them."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from villa.adversarial.ascent import AscentSettings
from villa.adversarial.injection import inject
from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.distributed.blocks import modes
from villa.distributed.strategy import Strategy
from villa.losses.base import Direction, Loss, Reduction
from villa.losses.classification import widened
from villa.models.base import Model, ModelOutput, Point
from villa.rng import micro_batch_seed, seed_pass
from villa.share import Turn

PrecisionName = Literal["fp32", "bf16", "fp16"]

#: Autocast types.
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


#: Relative size, in units of the precision, below which less than a tenth of the entries change.
_LOST = 1 / 16
#: Relative size below which a perturbation leaves predictions as they are: their divergence is about its square.
_TINY = 1e-4
#: Divergence that is lost among the rounding of probabilities.
_NO_DIVERGENCE = 1e-9

logger = logging.getLogger(__name__)


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
        """Run the model under autocast; return logits and extras in fp32 or wider."""
        with self.autocast():
            output: ModelOutput = model(batch)
        return output.map_scores(widened)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast context; it does nothing in fp32."""
        return torch.autocast(self.device.type, dtype=self.dtype) if self.dtype is not None else nullcontext()

    def notes(self) -> list[str]:
        """Return a note if this CPU multiplies no bf16 by itself."""
        slow = self.dtype == torch.bfloat16 and self.device.type == "cpu" and not _multiplies_bf16()
        return ["bf16 on this CPU, which has neither AVX512-BF16 nor AMX, may be slower than fp32"] if slow else []

    @property
    def loss_scale(self) -> float:
        """Current loss scale; 1 without a scaler."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else 1.0


def _multiplies_bf16() -> bool:
    """Return whether this machine's CPU has instructions for products of bf16; True if that is not known."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(supported is None or supported() for supported in known)


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Put a model into evaluation mode within the context, then restore the mode of every module."""
    return modes([(module, False) for module in model.modules()])


class ModelPasses:
    """The implementation of ``villa.trainers.base.Passes``.

    Args:
        model: the model to run.
        loss: the task loss.
        precision: autocast and loss scaling.
        seed: the run's seed; dropout and random starts derive from (seed, update, micro-batch, pass), so that they do
            not depend on which process runs a micro-batch.
        strategy: sums gradients over processes.
        noise: noise on training passes without perturbations, by modality.

    Attributes:
        losses: of the losses back-propagated in this update (stand-ins excluded), the micro-batch's place on this
            process and the detached value.
        ascents: of the perturbation gradients that ``gradient`` computed in this update (stand-ins excluded), the
            micro-batch's place, the modality and the sum of its entries, which is finite if they are.
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        precision: Precision,
        seed: int,
        strategy: Strategy | None = None,
        noise: Mapping[str, AscentSettings] | None = None,
    ) -> None:
        self.model = model
        self.loss_function = loss
        self.precision = precision
        self.points: Mapping[str, Point] = {**model.perturbation_points(), **model.other_points()}
        self.losses: list[tuple[int, Tensor]] = []
        self.ascents: list[tuple[int, str, Tensor]] = []
        self.strategy = strategy or Strategy()
        self._noise = noise or {}
        self._check = _no_check
        self._reference: Callable[[], AbstractContextManager[None]] = nullcontext
        self._seed = seed
        self._update = self._place = 0
        self._turn = Turn(0)
        self._weight = self._scale = 1.0
        self._last = True
        self._unmeasured = set(self.points)
        self._moved: bool | None = False

    def begin(
        self,
        update: int,
        place: int,
        weight: float,
        *,
        turn: Turn | None = None,
        last: bool = True,
        check: Callable[[], None] | None = None,
        reference: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        """Start a micro-batch, whose losses will be multiplied by ``weight``.

        Args:
            update: the optimiser step, from 1.
            place: index of the micro-batch on this process; 0 starts the update.
            weight: weight of the micro-batch in the update; 0 for a stand-in.
            turn: number of the micro-batch in the update; ``place`` by default.
            last: whether it is the last micro-batch of this process.
            check: called before every pass; raises to abort the update.
            reference: returns a context in which the model's weights are those that ``reference`` runs; by default
                they are its own.
        """
        if place == 0:
            self.losses.clear()
            self.ascents.clear()
            self._scale = self.precision.loss_scale  # reading it waits for the device, and it changes between updates
        self._check, self._reference = check or _no_check, reference or nullcontext
        self._update, self._place, self._weight = update, place, weight
        self._turn, self._last = turn or Turn(place), last

    @cached_property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The model's parameters: walking through its modules in every update takes longer than a small one's step."""
        return tuple(self.model.parameters())

    def buffers(self) -> list[Tensor]:
        """Return the model's buffers; see ``parameters``."""
        found = (buffer for module in self._with_buffers for buffer in module._buffers.values())
        return [buffer for buffer in found if buffer is not None]

    @cached_property
    def _with_buffers(self) -> tuple[nn.Module, ...]:
        return tuple(module for module in self.model.modules() if module._buffers)

    @property
    def gradient_scale(self) -> float:
        """Loss scale x micro-batch weight; only the loss scale if the weight, and thus every gradient, is 0."""
        return self._scale * (self._weight or 1.0)

    def seed(self, name: str) -> int:
        """Return a seed for the random draws called ``name`` of this micro-batch."""
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
        """Run the model with the perturbations added at their points; return logits in fp32 or wider."""
        self._check()
        if self._noise and train and not perturbations:
            perturbations = {m: self._drawn(m, settings, index) for m, settings in self._noise.items()}
        seed_pass(self._seed, self._update, self._turn.number, index)
        injected = inject(self.model, self.points, perturbations, batch) if perturbations else nullcontext()
        mode = nullcontext() if train else evaluating(self.model)
        with torch.set_grad_enabled(grad), mode, injected:
            output = self.precision.run(self.model, batch)
        if perturbations and not self._unmeasured.isdisjoint(perturbations):
            self._warn_of_size(perturbations, train=train)
        return output

    def reference(self, batch: Batch, *, train: bool = True) -> ModelOutput:
        """Run the model at the running average of the weights; see ``villa.trainers.base.Passes``."""
        with self._reference():
            return self.forward(batch, grad=False, train=train)

    def loss(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean task loss of the micro-batch."""
        value: Tensor = self.loss_function(output, batch)
        return value

    def consistency(
        self,
        output: ModelOutput,
        clean: ModelOutput,
        batch: Batch,
        reduction: Reduction = "batchmean",
        direction: Direction = "symmetric",
    ) -> Tensor:
        """Return the loss's divergence between perturbed and clean predictions."""
        asked = {} if direction == "symmetric" else {"direction": direction}  # a loss may know this one alone
        value = self.loss_function.consistency(output, clean, batch, reduction, **asked)
        if self._moved:
            self._moved = None  # once
            if abs(value.item()) < _NO_DIVERGENCE:
                text = "the divergence of perturbed from clean predictions is %.0e: enlarge the perturbation"
                logger.warning(text, value.item())
        return value

    def gradient(self, loss: Tensor, perturbations: Mapping[str, Perturbation], *, retain: bool = False) -> None:
        """Set the gradient of ``loss`` on perturbations alone; see ``villa.trainers.base.Passes``."""
        deltas = [perturbation.trained() for perturbation in perturbations.values()]
        scale = self._scale
        gradients = self.strategy.gradient(loss * scale if scale != 1.0 else loss, deltas, retain=retain)
        if self._turn.own:
            self.losses.append((self._place, loss.detach()))
        for modality, delta, gradient in zip(perturbations, deltas, gradients, strict=True):
            if gradient is not None and self._turn.own:
                self.ascents.append((self._place, modality, gradient.sum()))
            delta.grad = gradient if gradient is None or scale == 1.0 else gradient / scale

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Back-propagate the scaled, weighted loss; the ``last`` pass of the update sums gradients over processes."""
        if self._turn.own:
            self.losses.append((self._place, loss.detach()))
        with self.strategy.backward(reduce=last and self._last):
            weighted = loss if self._weight == 1.0 else loss * self._weight
            torch.autograd.backward(self.precision.scaler.scale(weighted))

    def _drawn(self, modality: str, settings: AscentSettings, index: int) -> Perturbation:
        """Return the noise of a clean pass, which never moves."""
        made = Perturbation(settings, self.seed(f"noise/{modality}/{index}"))
        made.frozen = True
        return made

    def _warn_of_size(self, perturbations: Mapping[str, Perturbation], *, train: bool) -> None:
        """Warn, once a modality, if the first perturbation that is not zero is lost in autocast, or trains nothing."""
        dtype = self.precision.dtype
        for modality in self._unmeasured & perturbations.keys():
            size = perturbations[modality].relative_size
            share = 0.0 if size is None else size.item()
            if share:
                self._unmeasured.discard(modality)
                self._moved = self._moved is not None
            if dtype is not None and 0 < share < torch.finfo(dtype).eps * _LOST:
                text = "the perturbation (%s) is %.0e of the embedding, which %s rounds away in most entries: use fp32"
                logger.warning(text, modality, share, str(dtype).removeprefix("torch."))
            elif train and 0 < share < _TINY:
                text = "the perturbation (%s) is %.0e of the embedding, too little to change predictions: enlarge it"
                logger.warning(text, modality, share)


def _no_check() -> None:
    """Do not check for signals."""
