"""What an adversarial method ("trainer") owes the loop, and what the loop lends it."""

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
from villa.losses.base import Reduction
from villa.models.base import ModelOutput

#: Detached values to log, by name; a trainer prefixes per-pass values with ``pass<t>/``.
Logs = dict[str, Tensor]


#: Numbers of forward and backward passes, and of ascents where there are any.
Cost = tuple[int, int] | tuple[int, int, int]


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
        train: bool = True,
    ) -> ModelOutput:
        """Run the model, with perturbations added at their points.

        Args:
            batch: the micro-batch.
            perturbations: by modality; created on their first pass, inside the model's own forward.
            index: names the random state: equal indices get equal dropout masks.
            grad: False runs without an autograd graph.
            train: False runs the model as in evaluation, without dropout.
        """

    def loss(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean task loss of the micro-batch."""

    def consistency(self, output: ModelOutput, clean: ModelOutput, batch: Batch, reduction: Reduction) -> Tensor:
        """Return the divergence of the predictions from those on clean inputs, as the loss defines it."""

    def gradient(self, loss: Tensor, perturbations: Mapping[str, Perturbation]) -> None:
        """Give perturbations, and nothing else, the gradient of a loss; ``perturbation.ascend()`` takes the step then.

        It is that of ``loss`` as given, without the loss scale and the weight of the micro-batch, and no other process
        adds to it. Gradients of parameters stay what they are; they are not even computed, which takes about a third
        off the pass. Each perturbation must have been added by the forward pass that the loss comes from, whose graph
        is used up. An fp16 overflow skips the update and lowers the loss scale; a gradient that is not finite for
        another reason counts as one in ``backward`` does.

        Raises:
            RuntimeError: a perturbation is frozen, or has moved since its last forward pass.
        """

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Back-propagate. ``last`` marks the micro-batch's last backward: gradients may be reduced then.

        Gradients of perturbations are those of the scaled, weighted loss: ``perturbation.ascend(gradient_scale)``.
        """


class Frame(Protocol):
    """What the loop lends a trainer for one update: its micro-batches, the weights around them, and the step.

    Weights and gradients are dictionaries by the weight's name. Where processes share a model, a tensor in them is the
    process's part of it, of whatever shape: what is computed element by element is right for parts, and norms come from
    the frame. An update that a signal ends, or that is skipped for a value that is not finite, leaves everything as it
    was: weights, buffers, and what ``Trainer.state_dict`` returned.

    Attributes:
        number: of the update, from 1.
    """

    number: int

    @property
    def weights(self) -> dict[str, Tensor]:
        """The trained weights themselves."""

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The gradients that ``accumulate`` has left: of the whole update, unscaled, not clipped.

        A weight without one is missing; so is, where each process has the gradients of some weights, that of another.
        """

    def accumulate(self) -> Logs:
        """Run ``Trainer.step`` on every micro-batch; gradients are those of this run alone, summed over processes.

        Once more in the same update, it repeats all dropout masks and random starts. It does not return when a signal
        ends the run or a value is not finite: the update is over then.

        Returns:
            Values to log: means over all examples of the update.
        """

    def norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the l2 norm of tensors by weight (weights, gradients or like them), all of them together."""

    def norms(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the l2 norm of each of the whole tensors; see ``norm``. All processes call it."""

    def moved(self, offsets: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Context in which weights have moved by ``offsets``; then they, and buffers, are to the bit what they were."""

    def step(self) -> None:
        """Clip the gradients and take the optimiser's step: once an update, outside of ``moved``."""


class Trainer(ABC):
    """An adversarial method: which passes run on which perturbations, and what is back-propagated."""

    Config: ClassVar[type[TrainerConfig]] = TrainerConfig
    config: TrainerConfig

    def __init__(self, config: Any = None) -> None:
        self.config = config if config is not None else self.Config()

    @cached_property
    def weight_state(self) -> dict[str, dict[str, Tensor]]:
        """What the method keeps of weights, such as a running average: by a word, tensors like ``Frame.weights``.

        It may be changed after ``Frame.step``. Checkpoints have it whole, and give each process its parts again.
        """
        return {}

    @abstractmethod
    def step(self, batch: Batch, passes: Passes) -> Logs:
        """Run all passes of one micro-batch; return detached values to log, with ``loss`` among them."""

    def update(self, frame: Frame) -> Logs:
        """Run an update: here what a method does to weights around its micro-batches, before and after the step.

        Returns:
            Values to log.
        """
        logs = frame.accumulate()
        frame.step()
        return logs

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides ``weight_state``; the same on all processes.

        Nested dicts, lists and tuples of tensors, numbers, text and None. Called before every update, too.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict()``; not called for a checkpoint of another method, or one that has no such state.

        Raises:
            ValueError: the state is none of this method.
        """
        if state:
            raise ValueError(f"{type(self).__name__} cannot load what it is given: it keeps no state")

    @abstractmethod
    def cost(self) -> Cost:
        """Forward and backward passes of one micro-batch, and ascents by ``Passes.gradient`` if there are any.

        A backward costs about two forwards, an ascent one.
        """

    def cost_of(self, objective: str) -> Cost:
        """Forward and backward passes of a micro-batch of an objective of pre-training; by default as of any other."""
        return self.cost()

    def relative_cost(self, objectives: Mapping[str, float] | None = None) -> float:
        """Cost relative to standard training, a backward counting as two forwards.

        Args:
            objectives: of a mixture, with how often an update is of each: the cost is the mean over updates.
        """
        weights = objectives or {}
        costs = [(self.cost_of(name), weight) for name, weight in weights.items()] or [(self.cost(), 1.0)]
        total = sum(weight * forward_equivalents(cost) / 3 for cost, weight in costs)
        return total / sum(weight for _, weight in costs)

    def modalities(self) -> tuple[str, ...]:
        """The modalities that are perturbed, to check against the model's points before training."""
        return ()


def forward_equivalents(cost: Cost) -> int:
    """What passes cost in forward passes: a backward two, an ascent (without gradients of parameters) one."""
    forwards, backwards, *ascents = cost
    return forwards + 2 * backwards + sum(ascents)
