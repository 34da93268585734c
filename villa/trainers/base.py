"""Interfaces between an adversarial method ("trainer") and the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

from torch import Tensor

from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.losses.base import Direction, Reduction
from villa.models.base import Model, ModelOutput

#: Detached values to log, by name; a trainer prefixes per-pass values with ``pass<t>/``.
Logs = dict[str, Tensor]


#: Numbers of forward and backward passes, and of ascents where there are any.
Cost = tuple[int, int] | tuple[int, int, int]


@dataclass
class TrainerConfig:
    """Options that every trainer has: its registered name."""

    name: str = "standard"


class Passes(Protocol):
    """Forward and backward passes of one micro-batch, provided by the loop.

    Handles autocast, loss scaling, accumulation, gradient reduction and random state.
    """

    @property
    def gradient_scale(self) -> float:
        """Current factor on every gradient (loss scale x micro-batch weight)."""

    def seed(self, name: str) -> int:
        """Return a seed for the random draws called ``name`` of this micro-batch."""

    def forward(
        self,
        batch: Batch,
        perturbations: Mapping[str, Perturbation] | None = None,
        *,
        index: int = 0,
        grad: bool = True,
        train: bool = True,
    ) -> ModelOutput:
        """Run the model, with perturbations added at their points.

        Args:
            batch: the micro-batch.
            perturbations: by modality; initialised on their first pass, inside the model's own forward.
            index: selects the random state: equal indices get equal dropout masks.
            grad: False runs without an autograd graph.
            train: False runs the model in evaluation mode, without dropout.
        """

    def reference(self, batch: Batch, *, train: bool = True) -> ModelOutput:
        """Run the clean pass at the running average of the weights that ``Trainer.reference_decay`` asks for.

        The output has no graph, and the dropout masks of ``forward(batch, index=0)``, or none with ``train=False``.
        Call it before the passes whose graphs are back-propagated.
        """

    def loss(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean task loss of the micro-batch."""

    def consistency(
        self,
        output: ModelOutput,
        clean: ModelOutput,
        batch: Batch,
        reduction: Reduction = "batchmean",
        direction: Direction = "symmetric",
    ) -> Tensor:
        """Return the loss's divergence between perturbed and clean predictions; see ``Loss.consistency``."""

    def gradient(self, loss: Tensor, perturbations: Mapping[str, Perturbation], *, retain: bool = False) -> None:
        """Set the gradient of a loss on perturbations alone, for ``perturbation.ascend()`` to step along.

        It is the gradient of ``loss`` itself, without loss scale and micro-batch weight, and is not summed over
        processes. Gradients of parameters do not change; they are not computed at all, which saves about a third of the
        pass. Each perturbation must have been added by the forward pass of the loss. An fp16 overflow skips the update
        and lowers the loss scale; other non-finite gradients are treated as in ``backward``.

        Args:
            loss: the loss.
            perturbations: by modality.
            retain: keep the graph of the loss for a backward pass to come; otherwise it is freed.

        Raises:
            RuntimeError: a perturbation is frozen, or has moved since its last forward pass.
        """

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Back-propagate. ``last`` marks the micro-batch's last backward pass, after which gradients may be reduced.

        Perturbations get the gradient of the scaled, weighted loss: call ``perturbation.ascend(gradient_scale)``.
        """


class Frame(Protocol):
    """One update, provided by the loop: its micro-batches, changes to the weights around them, and the optimiser step.

    Weights and gradients are dictionaries by weight name. Under sharding, each tensor is this process's part, of any
    shape: compute elementwise, and take norms from the frame. An update that is interrupted by a signal, or skipped for
    a non-finite value, restores weights, buffers and the trainer's ``state_dict``.

    Attributes:
        number: number of the update, from 1.
    """

    number: int

    @property
    def weights(self) -> dict[str, Tensor]:
        """The trained weights themselves."""

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The accumulated gradients of the whole update, unscaled and not clipped.

        Weights without a gradient are missing; so are those whose gradient another process owns.
        """

    def accumulate(self) -> Logs:
        """Run ``Trainer.step`` on every micro-batch; the gradients of this run alone are summed over processes.

        A second call in the same update repeats all dropout masks and random starts. It does not return if a signal
        arrives or a value is not finite: the update is then over.

        Returns:
            Values to log: means over all examples of the update.
        """

    def norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the joint l2 norm of tensors keyed by weight name, such as weights or gradients; a collective call."""

    def norms(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the l2 norm of each whole tensor; see ``norm``."""

    def moved(self, offsets: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Shift the weights by ``offsets`` within the context; afterwards restore them and the buffers bit for bit."""

    def step(self) -> None:
        """Clip the gradients and take the optimiser step: once an update, outside ``moved``."""


class Trainer(ABC):
    """An adversarial method: the passes to run, their perturbations, and the losses to back-propagate.

    Attributes:
        stochastic: whether the model's training passes draw random numbers (``Model.stochastic``), set before training.
        noisy: whether passes without perturbations get noise (``training.noise``), set before training.
    """

    Config: ClassVar[type[TrainerConfig]] = TrainerConfig
    config: TrainerConfig
    stochastic: bool = True
    noisy: bool = False

    def __init__(self, config: Any = None) -> None:
        self.config = config if config is not None else self.Config()

    @cached_property
    def weight_state(self) -> dict[str, dict[str, Tensor]]:
        """Tensors that the method keeps per weight, such as a running average: dictionaries like ``Frame.weights``.

        May be changed after ``Frame.step``. Checkpoints store whole tensors and restore each process's part.
        """
        return {}

    def reference_decay(self, progress: float) -> float | None:
        """Return the decay of the running average of the weights that ``Passes.reference`` runs.

        The average starts with the weights before the first update, takes in those after every optimiser step, and is
        part of ``weight_state``.

        Args:
            progress: share of the training that the update ends, above 0 and at most 1.

        Returns:
            The decay, or None (the default) if the method has no use for the average. 1 keeps the weights of the start.
        """
        return None

    @abstractmethod
    def step(self, batch: Batch, passes: Passes) -> Logs:
        """Run all passes of one micro-batch; return detached values to log, including ``loss``."""

    def clean_step(self, batch: Batch, passes: Passes) -> Logs:
        """Run a micro-batch on clean inputs alone, as in an update that was not finite with perturbations."""
        return clean_step(batch, passes)

    def update(self, frame: Frame) -> Logs:
        """Run an update; override it to change weights around the micro-batches or the step.

        Returns:
            Values to log.
        """
        logs = frame.accumulate()
        frame.step()
        return logs

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs besides ``weight_state``; the same on all processes.

        May nest dicts, lists and tuples of tensors, numbers, strings and None. Also called before every update.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict()``; not called for a checkpoint of another method or without such a state.

        Raises:
            ValueError: the state does not belong to this method.
        """
        if state:
            raise ValueError(f"{type(self).__name__} cannot load what it is given: it keeps no state")

    @abstractmethod
    def cost(self) -> Cost:
        """Return the forward passes, backward passes and (if any) ascents by ``Passes.gradient`` of a micro-batch.

        A backward pass costs about two forward passes, an ascent one.
        """

    def cost_of(self, objective: str) -> Cost:
        """Return the cost for a pre-training objective; by default that of any micro-batch."""
        return self.cost()

    def relative_cost(self, objectives: Mapping[str, float] | None = None) -> float:
        """Return the cost relative to standard training, with a backward pass as two forward passes.

        Args:
            objectives: relative frequencies of a mixture's objectives, over which to average the cost.
        """
        weights = objectives or {}
        costs = [(self.cost_of(name), weight) for name, weight in weights.items()] or [(self.cost(), 1.0)]
        total = sum(weight * forward_equivalents(cost) / 3 for cost, weight in costs)
        return total / sum(weight for _, weight in costs)

    def modalities(self) -> tuple[str, ...]:
        """Return the perturbed modalities, which are checked against the model's points before training."""
        return ()

    def notes(self) -> list[str]:
        """Return notes on options that have no effect on the model, one line each; see ``stochastic``."""
        return []

    def check(self, model: Model) -> None:  # noqa: B027 - a method need not check
        """Check that the options fit a model, which has the points of ``modalities``; by default they do.

        Raises:
            ConfigError: they do not.
        """


def forward_equivalents(cost: Cost) -> int:
    """Return a cost in forward passes: a backward pass counts two, an ascent (without weight gradients) one."""
    forwards, backwards, *ascents = cost
    return forwards + 2 * backwards + sum(ascents)


def clean_step(batch: Batch, passes: Passes) -> Logs:
    """Run and back-propagate one clean pass; also used by adversarial methods for batches that they do not perturb."""
    loss = passes.loss(passes.forward(batch), batch)
    passes.backward(loss, last=True)
    return {"loss": loss.detach()}
