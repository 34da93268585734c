"""Optimiser steps from micro-batches, and the state that they change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from villa.batch import Batch
from villa.checkpoints.tensors import named_parameters, parameter_indices
from villa.config.schema import TrainingConfig, WeightPerturbationConfig
from villa.distributed.strategy import Strategy
from villa.engine import averages
from villa.engine.averages import Average, put_back
from villa.engine.frame import Accumulation, MicroBatches, SkippedUpdateError, UpdateFrame
from villa.engine.fused_adam import FusedAdam
from villa.engine.parameter_groups import check_prefixes
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

#: The average of ``training.ema`` in checkpoints, and that of ``Passes.reference`` among what the trainer keeps.
_EMA, _REFERENCE = "ema", "reference_average"


class Updater:
    """Runs one optimiser step on the micro-batches of an update.

    Args:
        passes: the model with its loss, precision and strategy.
        trainer: the adversarial method.
        optimizer: optimiser whose groups have ``initial_lr``.
        schedule: learning rate by update.
        config: clipping, averaging, and the policy for NaN and infinity.
        accumulation: ``mean`` over the update's examples, the ``sum`` of micro-batch means, or the ``total`` over
            examples.

    Attributes:
        skipped: updates in a row, up to the last one, that were skipped or trained without perturbations.
        ema: running average of the weights, or None without ``training.ema`` and before the first update.
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
        self.ema: Average | None = None
        self._averaged = 0
        check_prefixes("training.clip_norms", config.clip_norms, self.model)
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
        self._start_averages(number)
        frame = UpdateFrame(self.passes, self.trainer, self.optimizer, work, self.config, self._at_reference)
        buffers = [(buffer, buffer.clone()) for buffer in self.passes.buffers()]
        state = copy.deepcopy(self.trainer.state_dict())
        try:
            moved = self.config.weight_perturbation
            perturbs = moved.name != "none" and number > moved.after
            logs = perturb_weights(frame, moved) if perturbs else self.trainer.update(frame)
            if not frame.stepped:
                raise RuntimeError(f"{type(self.trainer).__name__}.update has not called frame.step()")
            self._advance_averages(number)
            if frame.unperturbed is None:
                self.skipped = 0
            else:
                print(f"trained on clean inputs alone in update {number}: {frame.unperturbed}", flush=True)
                self._count_skip(number, frame.unperturbed, "trained on clean inputs alone")
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
        return logs | {"gradient_norm": frame.gradient_norm} | frame.group_norms

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the model's weights are their running average, if there is one."""
        if self.ema is None:
            return nullcontext()
        return averages.in_place_of_weights(self.ema, self.optimizer, self.strategy)

    def state_dict(self, *, whole: bool = True) -> dict[str, Any]:
        """Return the state that a resumed run needs: optimiser, loss scale, skipped updates, trainer, average.

        Args:
            whole: gather sharded tensors, which makes this a collective call.
        """
        strategy, optimizer = self.strategy, self.optimizer
        state = {
            "optimizer": strategy.optimizer_state(optimizer) if whole else optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "skipped": self.skipped,
            "trainer": {
                "state": self.trainer.state_dict(),
                "weights": self._gathered(self.trainer.weight_state, whole=whole),
            },
        }
        if self.ema is None:
            return state
        average = {"state": {"updates": self._averaged}, "weights": self._gathered({_EMA: self.ema}, whole=whole)}
        return {**state, "average": average}

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
            self.trainer.load_state_dict(state["trainer"]["state"])
            self.trainer.weight_state = self._parts(state["trainer"]["weights"])
            if self._reference_decay(1) is None:  # of a run whose options asked for it
                self.trainer.weight_state.pop(_REFERENCE, None)
        if "average" in state and self.config.ema is not None:
            self.ema = self._parts(state["average"]["weights"])[_EMA]
            self._averaged = state["average"]["state"]["updates"]
            if not is_count(self._averaged) or self.ema.keys() != named_parameters(self.optimizer).keys():
                raise ValueError("the running average is not that of this model's weights")

    def _undo(self, buffers: Sequence[tuple[Tensor, Tensor]], state: Mapping[str, Any]) -> None:
        """Undo an update before its step: gradients, buffers and the trainer's state."""
        self.optimizer.zero_grad(set_to_none=True)
        put_back(buffers)
        self.trainer.load_state_dict(state)

    def _skip_or_stop(self, number: int, cause: str | None) -> None:
        if cause is None:  # an fp16 overflow, which the loss scaler handles
            self.skipped = 0
            return
        if self.config.nonfinite == "stop":
            advice = "lower the learning rate or step sizes, or set training.nonfinite=skip"
            raise NonFiniteError(f"update {number}: {cause}; {advice}")
        self._count_skip(number, cause, "skipped")
        print(f"skipped update {number}: {cause}", flush=True)

    def _count_skip(self, number: int, cause: str, done: str) -> None:
        """Count an update that was not finite; stop if there were too many in a row."""
        if self.skipped == self.config.max_skips:
            raise NonFiniteError(
                f"update {number}: {cause}; the {self.skipped} updates before it were {done} already "
                "(training.max_skips): lower the learning rate or step sizes, or mend the data"
            )
        self.skipped += 1

    def _start_averages(self, number: int) -> None:
        """Start the averages that are asked for, and do not exist, with the weights before the update."""
        kept = self.trainer.weight_state
        referred = self._reference_decay(number) is not None and _REFERENCE not in kept
        if not referred and (self.config.ema is None or self.ema is not None):
            return
        self.strategy.put_away()
        weights = averages.local_weights(self.optimizer, self.strategy)
        if referred:
            kept[_REFERENCE] = averages.start(weights)
        if self.config.ema is not None and self.ema is None:
            self.ema = averages.start(weights)

    def _advance_averages(self, number: int) -> None:
        """Take the weights after an optimiser step into the averages."""
        decay, ema = self._reference_decay(number), self.config.ema
        if decay is None and ema is None:
            return
        weights = averages.local_weights(self.optimizer, self.strategy)
        if decay is not None:
            averages.advance(self.trainer.weight_state[_REFERENCE], weights, decay)
        if ema is not None and self.ema is not None:
            averages.advance(self.ema, weights, averages.warmed_up(ema, self._averaged))
            self._averaged += 1

    def _reference_decay(self, number: int) -> float | None:
        schedule = self.schedule
        return self.trainer.reference_decay((number + schedule.config.before) / schedule.total)

    def _at_reference(self) -> AbstractContextManager[None]:
        average = self.trainer.weight_state[_REFERENCE]
        return averages.in_place_of_weights(average, self.optimizer, self.strategy)

    def _gathered(self, kept: Mapping[str, Mapping[str, Tensor]], *, whole: bool) -> dict[str, dict[str, Tensor]]:
        """Return tensors kept per weight: gathered, or this process's parts in the form of the parameters."""
        form = self.strategy.whole_like if whole else self.strategy.shared
        parameters = named_parameters(self.optimizer) if kept else {}
        return {word: {name: form(part, parameters[name]) for name, part in of.items()} for word, of in kept.items()}

    def _parts(self, saved: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Tensor]]:
        """Return this process's parts of tensors kept per weight."""
        parameters = named_parameters(self.optimizer) if saved else {}
        return {
            word: {name: self._part_of_weight(word, name, value, parameters) for name, value in of.items()}
            for word, of in saved.items()
        }

    def _part_of_weight(self, word: str, name: str, whole: Any, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """Return this process's part of a tensor that is kept for a weight.

        Raises:
            ValueError: there is no such weight, or its shape differs.
        """
        # Parts loaded from checkpoint shards also have the whole shape.
        shape = self.strategy.shape(parameters[name]) if name in parameters else None
        if not isinstance(whole, Tensor) or whole.shape != shape:
            raise ValueError(f"'{word}' of '{name}' is not that of a parameter of this model")
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
