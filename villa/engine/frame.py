"""One update: all passes of all its micro-batches, the weights around them, clipping, and the optimiser's step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from villa.batch import Batch
from villa.checkpoints.tensors import named_parameters
from villa.distributed.strategy import overflows
from villa.engine.passes import ModelPasses
from villa.share import Turn
from villa.trainers.base import Logs, Trainer

Accumulation = Literal["mean", "sum", "total"]


@dataclass(frozen=True)
class MicroBatches:
    """What a process runs of an update.

    Attributes:
        number: of the update, from 1.
        batches: the micro-batches that this process runs.
        turns: which of the update's micro-batches they are.
        accumulation: ``mean`` over the update's examples, the ``sum`` of micro-batch means, or the ``total`` over
            examples.
        check: looks for signals: called between micro-batches, which all processes have as many of, and by a process
            that is alone before every pass, too.
    """

    number: int
    batches: Sequence[Batch]
    turns: Sequence[Turn]
    accumulation: Accumulation
    check: Callable[[], None]


class SkippedUpdateError(Exception):
    """Ends an update that has met a value which is not finite, through whatever a method has around it.

    Args:
        cause: what is not finite, one line; None for an fp16 overflow, which the loss scaler mends by itself.
    """

    def __init__(self, cause: str | None = None) -> None:
        super().__init__(cause)
        self.cause = cause


class UpdateFrame:
    """``villa.trainers.base.Frame`` of a process.

    Args:
        passes: of the micro-batches.
        trainer: whose ``step`` runs on each of them.
        optimizer: of the model's parameters.
        work: the micro-batches.
        clip_norm: bound on the norm of all gradients together, if there is one.

    Attributes:
        number: of the update.
        logs: the values to log of the last ``accumulate``.
        gradient_norm: the norm of the gradients that it has left.
        stepped: whether the step was taken.
    """

    def __init__(
        self,
        passes: ModelPasses,
        trainer: Trainer,
        optimizer: torch.optim.Optimizer,
        work: MicroBatches,
        clip_norm: float | None,
    ) -> None:
        self.passes, self.trainer, self.optimizer = passes, trainer, optimizer
        self.work, self.number, self.clip_norm = work, work.number, clip_norm
        self.model, self.strategy, self.scaler = passes.model, passes.strategy, passes.precision.scaler
        self.logs: Logs = {}
        self.gradient_norm = torch.zeros(())
        self.stepped = False
        self._runs = 0
        self._moved = False

    @property
    def weights(self) -> dict[str, Tensor]:
        """The trained weights themselves, or this process's part of each."""
        return {name: self.strategy.local(parameter) for name, parameter in self._trained.items()}

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The gradients that ``accumulate`` has left."""
        trained = self._trained.items()
        return {name: self.strategy.local(p.grad) for name, p in trained if p.grad is not None}

    def accumulate(self) -> Logs:
        """Run all micro-batches; return the values to log of all processes together.

        Raises:
            Interrupted: a signal ends the run.
            SkippedUpdateError: a loss or gradient is not finite.
        """
        if self.stepped:
            raise RuntimeError("the update's step was taken: accumulate() must come before step()")
        if self._runs:
            self.optimizer.zero_grad(set_to_none=True)
            if self.scaler.is_enabled():  # it may unscale once an update; there was no overflow
                self.scaler._per_optimizer_states.pop(id(self.optimizer))
        self._runs += 1
        logs = self._run()
        self.strategy.unscale(self.scaler, self.optimizer)
        self.gradient_norm = self.strategy.gradient_norm(self.model.parameters())
        self.logs, losses, ascents = self._of_all(logs)
        self._check_finite(losses, ascents)
        return dict(self.logs)

    def norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the l2 norm of tensors by weight, all of them together; all processes call it."""
        norm: Tensor = torch.linalg.vector_norm(torch.stack([*self.norms(tensors).values()]))
        return norm

    def norms(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the l2 norm of each of the whole tensors; all processes call it."""
        trained = self._trained
        device = next(iter(trained.values())).device
        norms = (tensors[name].norm() if name in tensors else torch.zeros((), device=device) for name in trained)
        squares = self.strategy.total(torch.stack([norm.double().square() for norm in norms]), [*trained.values()])
        return dict(zip(trained, squares.sqrt(), strict=True))

    @contextmanager
    def moved(self, offsets: Mapping[str, Tensor]) -> Iterator[None]:
        """Context in which weights have moved by ``offsets``; then they, and buffers, are to the bit what they were."""
        if self.stepped:
            raise RuntimeError("the update's step was taken: moved() must come before step()")
        weights, outer = self.weights, self._moved
        before = [(tensor, tensor.clone()) for tensor in (*weights.values(), *self.model.buffers())]
        self._moved = True
        try:
            with torch.no_grad():
                for name, offset in offsets.items():
                    weights[name].add_(offset)
            self.strategy.spread([*self._trained.values()])
            self.strategy.put_away()
            yield
        finally:
            put_back(before)
            self.strategy.put_away()
            self._moved = outer

    def step(self) -> None:
        """Clip the gradients and take the optimiser's step."""
        if not self._runs or self.stepped or self._moved:
            raise RuntimeError("step() comes once an update: after accumulate(), and outside of moved()")
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip_norm, self.gradient_norm)
        self.scaler.step(self.optimizer)
        self.stepped = True

    @cached_property
    def _trained(self) -> dict[str, nn.Parameter]:
        return named_parameters(self.optimizer)

    def _run(self) -> Logs:
        """Run all passes of the micro-batches; their gradients add up."""
        work, processes = self.work, self.strategy.processes
        loss = self.passes.loss_function
        counts = [loss.count(b) if turn.own else 0 for b, turn in zip(work.batches, work.turns, strict=True)]
        (total,) = processes.total([sum(counts)])
        between = work.check if processes.world_size == 1 else None  # other processes may be at another pass
        logs: Logs = {}
        for place, (batch, turn, count) in enumerate(zip(work.batches, work.turns, counts, strict=True)):
            if place or self._runs > 1:
                work.check()
            share, last = count / total, place + 1 == len(work.batches)
            weight = {"mean": share, "sum": float(turn.own), "total": float(count)}[work.accumulation]
            self.passes.begin(work.number, place, weight, turn=turn, last=last, check=between)
            _add(logs, self.trainer.step(batch, self.passes), share)
        return logs

    def _of_all(self, logs: Logs) -> tuple[Logs, Tensor, Tensor]:
        """The values to log of all processes together, and whether all their losses, and all ascents, are finite."""
        losses = _all(torch.isfinite(loss.float()) for _, loss in self.passes.losses)
        ascents = _all(finite for *_, finite in self.passes.ascents)
        if self.strategy.processes.world_size == 1:
            return logs, losses, ascents
        found = (~losses, ~ascents, *logs.values())
        bad, overflowed, *sums = self.strategy.processes.total(_numbers(found))
        summed = zip(logs.items(), sums, strict=True)
        logs = {name: torch.full_like(value, total) for (name, value), total in summed}
        return logs, torch.tensor(bad == 0), torch.tensor(overflowed == 0)

    def _check_finite(self, losses: Tensor, ascents: Tensor) -> None:
        """End the update if a value is not finite, or the loss scaler has found an overflow."""
        norm = torch.isfinite(self.gradient_norm.float())
        if norm & losses.to(norm.device) & ascents.to(norm.device):
            return
        if not self.scaler.is_enabled() or self.passes.precision.loss_scale <= 1.0 or not losses:
            parameters = self.model.named_parameters()
            passes, logs = self.passes, self.logs
            found = describe_nonfinite(passes.losses, logs, parameters, self.work.batches, passes.ascents)
            raise SkippedUpdateError(_first_cause(self.strategy.processes.gather(found)))
        found_inf = overflows(self.scaler, self.optimizer)
        for overflow in found_inf.values() if not ascents else ():
            overflow.fill_(1.0)  # so that the loss scale is lowered
        if any(overflow.item() for overflow in found_inf.values()):
            raise SkippedUpdateError


def put_back(before: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy into tensors what they were."""
    with torch.no_grad():
        for tensor, value in before:
            tensor.copy_(value)


def _all(flags: Iterator[Tensor]) -> Tensor:
    found = [*flags]
    return torch.stack(found).all() if found else torch.tensor(True)


def _numbers(values: Sequence[Tensor]) -> list[float]:
    """Read numbers from the device at once."""
    device = values[-1].device
    numbers: list[float] = torch.stack([value.to(device).double() for value in values]).tolist()
    return numbers


def _first_cause(found: Sequence[str]) -> str:
    """Of what the processes found, a loss before a gradient, and that before the norm that all of them see."""
    causes = (text for start in ("the loss", "the gradient") for text in found if text.startswith(start))
    return next(causes, found[0])


def _add(total: Logs, values: Logs, weight: float) -> None:
    for name, value in values.items():
        total[name] = total.get(name, torch.zeros_like(value)) + value * weight


def describe_nonfinite(
    losses: Sequence[tuple[int, Tensor]],
    logs: Mapping[str, Tensor],
    parameters: Iterable[tuple[str, nn.Parameter]],
    batches: Sequence[Batch],
    ascents: Sequence[tuple[int, str, Tensor]] = (),
) -> str:
    """Name the first loss or gradient of an update that is not finite, with the examples concerned.

    Args:
        losses: micro-batch number and value of every loss of the update, in order.
        logs: the update's values by name, which tell the parts of a loss apart.
        parameters: named parameters with their gradients.
        batches: the update's micro-batches.
        ascents: micro-batch number, modality, and whether it is finite, of every gradient of a perturbation alone.

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
    for micro_batch, modality, finite in ascents:
        if not finite:
            examples = _ids(batches[micro_batch : micro_batch + 1])
            return f"the gradient of a perturbation ({modality}) is not finite; examples: {examples}"
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
