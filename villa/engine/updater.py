"""One update: all passes of all its micro-batches, clipping, and the optimiser step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from villa.batch import Batch
from villa.checkpoints.tensors import parameter_indices
from villa.config.schema import TrainingConfig
from villa.distributed.strategy import Strategy
from villa.engine.optimizers import BertAdamW
from villa.engine.passes import ModelPasses, Precision
from villa.engine.schedules import Schedule
from villa.errors import NonFiniteError
from villa.json_values import is_count, is_number
from villa.losses.base import Loss
from villa.models.base import Model
from villa.share import Turn
from villa.signals import Interrupted
from villa.trainers.base import Logs, Trainer


def describe_nonfinite(
    losses: Sequence[tuple[int, Tensor]],
    logs: Mapping[str, Tensor],
    parameters: Iterable[tuple[str, nn.Parameter]],
    batches: Sequence[Batch],
) -> str:
    """Name the first loss or gradient of an update that is not finite, with the examples concerned.

    Args:
        losses: micro-batch number and value of every loss of the update, in order.
        logs: the update's values by name, which tell the parts of a loss apart.
        parameters: named parameters with their gradients.
        batches: the update's micro-batches.

    Returns:
        One line.
    """
    backward = dict.fromkeys(range(len(batches)), 0)
    for micro_batch, loss in losses:
        backward[micro_batch] += 1
        if not torch.isfinite(loss):
            named = ", ".join(name for name, value in logs.items() if not torch.isfinite(value))
            parts = f" (not finite: {named})" if named else ""
            what = f"the loss of backward pass {backward[micro_batch]} is {loss.item()}{parts}"
            return f"{what}; examples: {_ids(batches[micro_batch : micro_batch + 1])}"
    for name, parameter in parameters:
        if parameter.grad is not None and not _here(parameter.grad).isfinite().all():
            return f"the gradient of {name} is not finite; examples: {_ids(batches)}"
    return f"the norm of all gradients together is too large for a float; examples: {_ids(batches)}"


def _here(gradient: Tensor) -> Tensor:
    """This process's part of a gradient that several have."""
    part: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return part


def _ids(batches: Sequence[Batch]) -> str:
    return ", ".join(i for batch in batches for i in batch.ids)


Accumulation = Literal["mean", "sum", "total"]

#: What optimisers keep of every parameter, of its shape.
_MOMENTS: dict[type[torch.optim.Optimizer], tuple[str, str]] = {
    torch.optim.Adamax: ("exp_avg", "exp_inf"),
    **dict.fromkeys((torch.optim.Adam, torch.optim.AdamW, BertAdamW), ("exp_avg", "exp_avg_sq")),
}


class Updater:
    """Turns the micro-batches of an update into one optimiser step.

    Args:
        model: the model to train.
        loss: the task loss.
        trainer: the adversarial method.
        optimizer: with ``initial_lr`` in its groups.
        schedule: learning rate by update.
        config: clipping, precision and the policy for NaN and infinity.
        precision: autocast and loss scaling.
        accumulation: ``mean`` over the update's examples, the ``sum`` of micro-batch means, or the ``total`` over
            examples.
        seed: the run's seed.
        strategy: how processes share the update; by default there is one process.
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        trainer: Trainer,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        config: TrainingConfig,
        *,
        precision: Precision,
        accumulation: Accumulation,
        seed: int,
        strategy: Strategy | None = None,
    ) -> None:
        self.model, self.loss, self.trainer = model, loss, trainer
        self.optimizer, self.schedule, self.config = optimizer, schedule, config
        self.precision, self.accumulation = precision, accumulation
        self.strategy = strategy or Strategy()
        self.passes = ModelPasses(model, loss, precision, seed, self.strategy)
        self.skipped = 0

    def update(
        self,
        number: int,
        batches: Sequence[Batch],
        turns: Sequence[Turn] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Logs:
        """Run update ``number`` (from 1) and return its detached values to log.

        Args:
            number: of the update.
            batches: the micro-batches that this process runs.
            turns: which of the update's micro-batches they are; by default all of them.
            check: looks for signals: called between micro-batches, which all processes have as many of, and by a
                process that is alone before every pass, too.

        Raises:
            Interrupted: by ``check``; the update has changed nothing then.
            NonFiniteError: a loss or gradient is NaN or infinite and the policy is to stop.
        """
        self.schedule.apply(self.optimizer, number)
        turns = turns or [Turn(place) for place in range(len(batches))]
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            logs = self._run(number, batches, turns, check)
        except Interrupted:
            self._abandon(number, buffers)
            raise
        norm = self._gradient_norm()
        logs, finite_losses = self._of_all(logs)
        if self._acceptable(number, batches, norm, logs, finite_losses):
            self._step(norm)
        self.precision.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return logs | {"gradient_norm": norm}

    def state_dict(self, *, whole: bool = True) -> dict[str, Any]:
        """What a resumed run needs: optimiser, loss scale, skipped updates in a row.

        Args:
            whole: put tensors together that processes have parts of; all of them call it then.
        """
        strategy, optimizer = self.strategy, self.optimizer
        return {
            "optimizer": strategy.optimizer_state(optimizer) if whole else optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict()``; weight decay, betas and the like stay this run's own.

        Raises:
            ValueError: the state is of other parameters, or is none of an optimiser.
        """
        _load_moments(self.optimizer, state["optimizer"], self.strategy)
        scaler, self.skipped = state["scaler"], state["skipped"]
        if not is_count(self.skipped) or not all(map(is_number, scaler.values())):
            raise ValueError("the loss scale, or the updates that were skipped, are no numbers")
        self.precision.scaler.load_state_dict(scaler)

    def _run(self, number: int, batches: Sequence[Batch], turns: Sequence[Turn], check: Callable[[], None]) -> Logs:
        """Run all passes of the micro-batches; their gradients add up."""
        counts = [self.loss.count(batch) if turn.own else 0 for batch, turn in zip(batches, turns, strict=True)]
        (total,) = self.strategy.processes.total([sum(counts)])
        self.passes.check = check if self.strategy.processes.world_size == 1 else _go_on
        logs: Logs = {}
        for place, (batch, turn, count) in enumerate(zip(batches, turns, counts, strict=True)):
            if place:
                check()
            share = count / total
            weight = {"mean": share, "sum": float(turn.own), "total": float(count)}[self.accumulation]
            self.passes.begin(number, place, weight, turn=turn, last=place + 1 == len(batches))
            _add(logs, self.trainer.step(batch, self.passes), share)
        return logs

    def _abandon(self, number: int, buffers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Put back what the passes of an update have changed: gradients, running means and the like."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        if number > 1:
            self.schedule.apply(self.optimizer, number - 1)

    def _gradient_norm(self) -> Tensor:
        """Unscale the gradients and return their global norm."""
        self.strategy.unscale(self.precision.scaler, self.optimizer)
        return self.strategy.gradient_norm(self.model.parameters())

    def _step(self, norm: Tensor) -> None:
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip_norm, norm)
        self.precision.scaler.step(self.optimizer)

    def _of_all(self, logs: Logs) -> tuple[Logs, Tensor]:
        """The values to log of all processes together, and whether all their losses are finite."""
        losses = [loss.float() for _, loss in self.passes.losses]
        finite = torch.isfinite(torch.stack(losses)).all() if losses else torch.tensor(True)
        if self.strategy.processes.world_size == 1:
            return logs, finite
        values = torch.stack([value.to(finite.device).double() for value in (~finite, *logs.values())])
        bad, *sums = self.strategy.processes.total(values.tolist())
        summed = zip(logs.items(), sums, strict=True)
        return {name: torch.full_like(value, total) for (name, value), total in summed}, torch.tensor(bad == 0)

    def _acceptable(
        self, number: int, batches: Sequence[Batch], norm: Tensor, logs: Logs, finite_losses: Tensor
    ) -> bool:
        """Whether to take the step; a value that is not finite is named, and skips or stops the run."""
        finite = bool(torch.isfinite(norm.float()) & finite_losses.to(norm.device))
        if finite or not self._is_trouble(finite_losses):
            self.skipped = 0
            return True
        self._skip_or_stop(number, batches, logs)
        return False

    def _is_trouble(self, finite_losses: Tensor) -> bool:
        """Whether a non-finite value is more than an fp16 overflow, which the scaler mends by itself."""
        if not self.precision.scaler.is_enabled() or self.precision.loss_scale <= 1.0:
            return True
        return not finite_losses

    def _skip_or_stop(self, number: int, batches: Sequence[Batch], logs: Logs) -> None:
        found = describe_nonfinite(self.passes.losses, logs, self.model.named_parameters(), batches)
        message = f"update {number}: {_first_cause(self.strategy.processes.gather(found))}"
        if self.config.nonfinite == "stop":
            raise NonFiniteError(f"{message}; lower the learning rate or step sizes, or set training.nonfinite=skip")
        if self.skipped == self.config.max_skips:
            raise NonFiniteError(
                f"{message}; the {self.skipped} updates before it were skipped already (training.max_skips): "
                "lower the learning rate or step sizes, or mend the data"
            )
        self.skipped += 1
        print(f"skipped {message}", flush=True)


def _go_on() -> None:
    """Look for no signal: other processes may be at another pass."""


def _first_cause(found: Sequence[str]) -> str:
    """Of what the processes found, a loss before a gradient, and that before the norm that all of them see."""
    causes = (text for start in ("the loss", "the gradient") for text in found if text.startswith(start))
    return next(causes, found[0])


def _load_moments(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], strategy: Strategy) -> None:
    """Give every parameter its saved state by name, whatever group it is in now."""
    groups = optimizer.state_dict()["param_groups"]
    own, theirs = parameter_indices(groups), parameter_indices(saved["param_groups"])
    if own.keys() != theirs.keys():
        differing = sorted(own.keys() ^ theirs.keys())
        raise ValueError(f"the trained parameters differ: '{differing[0]}' ({len(differing)} in all)")
    parameters = {
        n: p for group in optimizer.param_groups for n, p in zip(group["names"], group["params"], strict=True)
    }
    state = {}
    for name, index in theirs.items():
        if index in saved["state"]:
            kept = saved["state"][index]
            _check_moments(name, kept, strategy.shape(parameters[name]), optimizer)
            state[own[name]] = strategy.part(kept, parameters[name])
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check_moments(name: str, kept: Mapping[str, Any], shape: torch.Size, optimizer: torch.optim.Optimizer) -> None:
    """Refuse what would break the next step: torch takes whatever it is given for an optimiser's state."""
    inner = getattr(optimizer, "optim", optimizer)  # fairscale's is around one
    needed = next((moments for kind, moments in _MOMENTS.items() if isinstance(inner, kind)), ()) if kept else ()
    wrong = [key for key in needed if not _is_moment(kept.get(key), shape)]
    if needed and not is_number(float(kept["step"])):
        wrong.append("step")
    if wrong:
        raise ValueError(f"the optimiser's '{wrong[0]}' of '{name}' is not that of a parameter of shape {list(shape)}")


def _is_moment(value: Any, shape: torch.Size) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point()
    return dense and value.shape == shape


def _add(total: Logs, values: Logs, weight: float) -> None:
    for name, value in values.items():
        total[name] = total.get(name, torch.zeros_like(value)) + value * weight
