"""Optimiser steps from micro-batches, and the state that they change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from villa.batch import Batch
from villa.checkpoints.tensors import named_parameters, parameter_indices
from villa.config.schema import TrainingConfig, WeightPerturbationConfig
from villa.distributed.strategy import Strategy
from villa.engine.frame import Accumulation, MicroBatches, SkippedUpdateError, UpdateFrame, put_back
from villa.engine.fused_adam import FusedAdam
from villa.engine.passes import ModelPasses
from villa.engine.schedules import Schedule
from villa.errors import ConfigError, NonFiniteError
from villa.json_values import is_count, is_number
from villa.share import Turn
from villa.signals import Interrupted
from villa.trainers.base import Logs, Trainer

#: State entries of the shape of the parameter, by optimiser.
_MOMENTS: dict[type[torch.optim.Optimizer], tuple[str, str]] = {
    torch.optim.Adamax: ("exp_avg", "exp_inf"),
    **dict.fromkeys((torch.optim.Adam, torch.optim.AdamW, FusedAdam), ("exp_avg", "exp_avg_sq")),
}


class Updater:
    """Runs one optimiser step on the micro-batches of an update.

    Args:
        passes: the model with its loss, precision and strategy.
        trainer: the adversarial method.
        optimizer: optimiser whose groups have ``initial_lr``.
        schedule: learning rate by update.
        config: clipping, and the policy for NaN and infinity.
        accumulation: ``mean`` over the update's examples, the ``sum`` of micro-batch means, or the ``total`` over
            examples.
    """

    def __init__(
        self,
        passes: ModelPasses,
        trainer: Trainer,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        config: TrainingConfig,
        accumulation: Accumulation = "mean",
    ) -> None:
        self.passes, self.trainer, self.accumulation = passes, trainer, accumulation
        self.optimizer, self.schedule, self.config = optimizer, schedule, config
        self.model, self.precision, self.strategy = passes.model, passes.precision, passes.strategy
        self.skipped = 0
        if config.passes() > 1 and type(trainer).update is not Trainer.update:
            raise ConfigError(
                f"training.weight_perturbation.name={config.weight_perturbation.name}: trainer "
                f"'{trainer.config.name}' acts on the weights itself; set it to none"
            )

    def update(
        self,
        number: int,
        batches: Sequence[Batch],
        turns: Sequence[Turn] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Logs:
        """Run update ``number`` (from 1) and return its detached values to log.

        Args:
            number: number of the update.
            batches: the micro-batches that this process runs.
            turns: numbers of these micro-batches in the update; by default all of them.
            check: checks for signals; see ``MicroBatches``.

        Raises:
            Interrupted: raised by ``check``; the update has been undone.
            NonFiniteError: a loss or gradient is NaN or infinite and the policy is to stop.
        """
        self.schedule.apply(self.optimizer, number)
        turns = turns or [Turn(place) for place in range(len(batches))]
        work = MicroBatches(number, batches, turns, self.accumulation, check)
        frame = UpdateFrame(self.passes, self.trainer, self.optimizer, work, self.config.clip_norm)
        buffers = [(buffer, buffer.clone()) for buffer in self.passes.buffers()]
        state = copy.deepcopy(self.trainer.state_dict())
        try:
            moved = self.config.weight_perturbation
            perturbs = moved.name != "none" and number > moved.after
            logs = perturb_weights(frame, moved) if perturbs else self.trainer.update(frame)
            if not frame.stepped:
                raise RuntimeError(f"{type(self.trainer).__name__}.update has not called frame.step()")
            self.skipped = 0
        except SkippedUpdateError as skipped:
            logs = frame.logs
            self._undo(buffers, state)
            self._skip_or_stop(number, skipped.cause)
        except Interrupted:
            self._undo(buffers, state)
            if number > 1:
                self.schedule.apply(self.optimizer, number - 1)
            raise
        self.precision.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return logs | {"gradient_norm": frame.gradient_norm}

    def state_dict(self, *, whole: bool = True) -> dict[str, Any]:
        """Return the state that a resumed run needs: optimiser, loss scale, consecutive skipped updates, trainer.

        Args:
            whole: gather sharded tensors, which makes this a collective call.
        """
        strategy, optimizer = self.strategy, self.optimizer
        return {
            "optimizer": strategy.optimizer_state(optimizer) if whole else optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "skipped": self.skipped,
            "trainer": self._trainer_state(whole=whole),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict()``, except weight decay, betas and the like, which are this run's own.

        Raises:
            ValueError: the state belongs to other parameters or is malformed.
        """
        _load_moments(self.optimizer, state["optimizer"], self.strategy)
        scaler, self.skipped = state["scaler"], state["skipped"]
        if not is_count(self.skipped) or not all(map(is_number, scaler.values())):
            raise ValueError("the loss scale, or the updates that were skipped, are no numbers")
        self.precision.scaler.load_state_dict(scaler)
        if "trainer" in state:  # earlier checkpoints have none
            self._load_trainer(state["trainer"])

    def _undo(self, buffers: Sequence[tuple[Tensor, Tensor]], state: Mapping[str, Any]) -> None:
        """Undo an update before its step: gradients, buffers and the trainer's state."""
        self.optimizer.zero_grad(set_to_none=True)
        put_back(buffers)
        self.trainer.load_state_dict(state)

    def _skip_or_stop(self, number: int, cause: str | None) -> None:
        if cause is None:  # an fp16 overflow, which the loss scaler handles
            self.skipped = 0
            return
        message = f"update {number}: {cause}"
        if self.config.nonfinite == "stop":
            raise NonFiniteError(f"{message}; lower the learning rate or step sizes, or set training.nonfinite=skip")
        if self.skipped == self.config.max_skips:
            raise NonFiniteError(
                f"{message}; the {self.skipped} updates before it were skipped already (training.max_skips): "
                "lower the learning rate or step sizes, or mend the data"
            )
        self.skipped += 1
        print(f"skipped {message}", flush=True)

    def _trainer_state(self, *, whole: bool) -> dict[str, Any]:
        """Return the trainer's state and its tensors per weight, gathered or as this process's parts."""
        form = self.strategy.whole_like if whole else self.strategy.shared
        kept = self.trainer.weight_state.items()
        parameters = named_parameters(self.optimizer) if kept else {}
        weights = {word: {name: form(part, parameters[name]) for name, part in of.items()} for word, of in kept}
        return {"state": self.trainer.state_dict(), "weights": weights}

    def _load_trainer(self, saved: Mapping[str, Any]) -> None:
        parameters = named_parameters(self.optimizer) if saved["weights"] else {}
        self.trainer.load_state_dict(saved["state"])
        self.trainer.weight_state = {
            word: {name: self._part_of_weight(word, name, value, parameters) for name, value in of.items()}
            for word, of in saved["weights"].items()
        }

    def _part_of_weight(self, word: str, name: str, whole: Any, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """Return this process's part of a tensor that the trainer keeps for a weight.

        Raises:
            ValueError: there is no such weight, or its shape differs.
        """
        # Parts loaded from checkpoint shards also have the whole shape.
        shape = self.strategy.shape(parameters[name]) if name in parameters else None
        if not isinstance(whole, Tensor) or whole.shape != shape:
            raise ValueError(f"the trainer's '{word}' of '{name}' is not that of a parameter of this model")
        return self.strategy.part_like(whole, parameters[name])


def perturb_weights(frame: UpdateFrame, config: WeightPerturbationConfig) -> Logs:
    """Run an update whose gradients are those at weights that have moved up the loss (SAM, AWP).

    Returns:
        The values of the first run, and the loss at the moved weights.
    """
    logs = frame.accumulate()
    weights, gradients = frame.weights, frame.gradients
    if config.name == "sam":
        scaled = {n: weights[n].abs() * g if config.adaptive else g for n, g in gradients.items()}
        scale = config.radius / (frame.norm(scaled) + 1e-12)
        moves = {n: scale * (weights[n].abs() * g if config.adaptive else g) for n, g in scaled.items()}
    else:
        matrices = {n: g for n, g in gradients.items() if frame.dimensions(n) > 1}
        lengths, slopes = frame.norms(weights), frame.norms(matrices)
        moves = {n: config.radius * lengths[n] / (slopes[n] + 1e-20) * g for n, g in matrices.items()}
    with frame.moved(moves):
        perturbed = frame.accumulate()
    frame.step()
    return logs | {"perturbed_weights_loss": perturbed["loss"]}


def _load_moments(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], strategy: Strategy) -> None:
    """Load every parameter's saved state by name, regardless of its group."""
    groups = optimizer.state_dict()["param_groups"]
    own, theirs = parameter_indices(groups), parameter_indices(saved["param_groups"])
    if own.keys() != theirs.keys():
        differing = sorted(own.keys() ^ theirs.keys())
        raise ValueError(f"the trained parameters differ: '{differing[0]}' ({len(differing)} in all)")
    parameters = named_parameters(optimizer)
    state = {}
    for name, index in theirs.items():
        if index in saved["state"]:
            kept = saved["state"][index]
            _check_moments(name, kept, strategy.shape(parameters[name]), optimizer)
            state[own[name]] = strategy.part(kept, parameters[name])
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check_moments(name: str, kept: Mapping[str, Any], shape: torch.Size, optimizer: torch.optim.Optimizer) -> None:
    """Check the state of a parameter, which torch loads unchecked: errors would only surface in the next step."""
    inner = getattr(optimizer, "optim", optimizer)  # fairscale's OSS wraps an optimiser
    needed = next((moments for kind, moments in _MOMENTS.items() if isinstance(inner, kind)), ()) if kept else ()
    wrong = [key for key in needed if not _is_moment(kept.get(key), shape)]
    if needed and not is_number(float(kept["step"])):
        wrong.append("step")
    if wrong:
        raise ValueError(f"the optimiser's '{wrong[0]}' of '{name}' is not that of a parameter of shape {list(shape)}")


def _is_moment(value: Any, shape: torch.Size) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point()
    return dense and value.shape == shape
