"""One update: the passes of its micro-batches, changes to the weights around them, clipping and the optimiser step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from villa.batch import Batch
from villa.checkpoints.tensors import local_part, named_parameters
from villa.config.schema import TrainingConfig
from villa.distributed.strategy import overflows
from villa.engine.averages import put_back
from villa.engine.fused_adam import FusedAdam
from villa.engine.parameter_groups import longest_match
from villa.engine.passes import ModelPasses
from villa.share import Turn
from villa.trainers.base import Logs, Trainer

Accumulation = Literal["mean", "sum", "total"]

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of an update that one process runs.

    Attributes:
        number: number of the update, from 1.
        batches: the micro-batches that this process runs.
        turns: which of the update's micro-batches they are.
        accumulation: ``mean`` over the update's examples, the ``sum`` of micro-batch means, or the ``total`` over
            examples.
        check: raises if a signal has arrived. Called between micro-batches, of which all processes have the same
            number; a single process also calls it before every pass.
    """

    number: int
    batches: Sequence[Batch]
    turns: Sequence[Turn]
    accumulation: Accumulation
    check: Callable[[], None]


class SkippedUpdateError(Exception):
    """Aborts an update with a non-finite value, whatever the method has wrapped around it.

    Args:
        cause: what is not finite, in one line; None for an fp16 overflow, which the loss scaler handles.
    """

    def __init__(self, cause: str | None = None) -> None:
        super().__init__(cause)
        self.cause = cause


class UpdateFrame:
    """The implementation of ``villa.trainers.base.Frame``.

    Args:
        passes: forward and backward passes of a micro-batch.
        trainer: the method; its ``step`` runs on each micro-batch.
        optimizer: optimiser of the model's parameters.
        work: the micro-batches.
        config: bounds on gradient norms, and the policy for NaN and infinity.
        reference: returns a context in which the weights are those that ``passes.reference`` runs; see ``ModelPasses``.

    Attributes:
        number: number of the update.
        logs: values to log from the last ``accumulate``.
        gradient_norm: global gradient norm after the last ``accumulate``.
        group_norms: values to log: norms of the gradients that are clipped by themselves.
        stepped: whether the optimiser step has been taken.
        unperturbed: why the update trains on clean inputs alone, in one line; None if it does what the method says.
    """

    def __init__(
        self,
        passes: ModelPasses,
        trainer: Trainer,
        optimizer: torch.optim.Optimizer,
        work: MicroBatches,
        config: TrainingConfig,
        reference: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.passes, self.trainer, self.optimizer = passes, trainer, optimizer
        self.work, self.number, self.config, self.reference = work, work.number, config, reference
        self.model, self.strategy, self.scaler = passes.model, passes.strategy, passes.precision.scaler
        self.logs: Logs = {}
        self.gradient_norm = torch.zeros(())
        self.group_norms: Logs = {}
        self.stepped = False
        self.unperturbed: str | None = None
        self._runs = 0
        self._moved = False

    @property
    def weights(self) -> dict[str, Tensor]:
        """The trained weights themselves, or this process's part of each."""
        return {name: self.strategy.local(parameter) for name, parameter in self._trained.items()}

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The gradients accumulated by the last ``accumulate``."""
        trained = self._trained.items()
        return {name: self.strategy.local(p.grad) for name, p in trained if p.grad is not None}

    def accumulate(self) -> Logs:
        """Run all micro-batches; return the values to log, combined over all processes.

        With ``nonfinite=skip``, an update that is not finite is run again without the method's perturbations.

        Raises:
            Interrupted: a signal ends the run.
            SkippedUpdateError: a loss or gradient is not finite.
        """
        if self.stepped:
            raise RuntimeError("the update's step was taken: accumulate() must come before step()")
        if self.config.nonfinite == "stop" or self.unperturbed is not None or not self.trainer.modalities():
            return self._accumulate()
        buffers = [(buffer, buffer.clone()) for buffer in self.passes.buffers()]
        state = copy.deepcopy(self.trainer.state_dict())
        try:
            return self._accumulate()
        except SkippedUpdateError as skipped:
            if skipped.cause is None:
                raise
            self.unperturbed = skipped.cause
        put_back(buffers)
        self.trainer.load_state_dict(state)
        return self._accumulate()

    def _accumulate(self) -> Logs:
        """Run all micro-batches once; see ``accumulate``."""
        if self._runs:
            self.optimizer.zero_grad(set_to_none=True)
            if self.scaler.is_enabled():  # the scaler unscales only once an update; there was no overflow
                self.scaler._per_optimizer_states.pop(id(self.optimizer))
        self._runs += 1
        logs = self._run()
        self.strategy.unscale(self.scaler, self.optimizer)
        self.gradient_norm = self.strategy.gradient_norm(self.passes.parameters)
        self._check_finite(*self._combine(logs))
        return dict(self.logs)

    def dimensions(self, name: str) -> int:
        """Return the number of dimensions of a whole weight."""
        return len(self.strategy.shape(self._trained[name]))

    def norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the joint l2 norm of tensors keyed by weight name; a collective call."""
        norm: Tensor = torch.linalg.vector_norm(torch.stack([*self.norms(tensors).values()]))
        return norm

    def norms(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the l2 norm of each whole tensor; a collective call."""
        trained = self._trained
        device = next(iter(trained.values())).device
        norms = (tensors[name].norm() if name in tensors else torch.zeros((), device=device) for name in trained)
        squares = self.strategy.total(torch.stack([norm.double().square() for norm in norms]), [*trained.values()])
        return dict(zip(trained, squares.sqrt(), strict=True))

    @contextmanager
    def moved(self, offsets: Mapping[str, Tensor]) -> Iterator[None]:
        """Shift the weights by ``offsets`` within the context; afterwards restore them and the buffers bit for bit."""
        if self.stepped:
            raise RuntimeError("the update's step was taken: moved() must come before step()")
        weights, outer = self.weights, self._moved
        before = [(tensor, tensor.clone()) for tensor in (*weights.values(), *self.passes.buffers())]
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
        if self.config.clip_norms:
            self._clip_groups(self.config.clip_norms)
        elif self.config.clip_norm is not None:
            self._clip(self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.stepped = True

    def _clip(self, bound: float) -> None:
        """Shrink the gradients to a bound on their norm; our optimisers do so in their own pass over them."""
        if isinstance(self.optimizer, FusedAdam):
            self.optimizer.grad_scale = ((self.gradient_norm + 1e-6) / bound).clamp_min(1.0)
        else:
            torch.nn.utils.clip_grads_with_norm_(self.passes.parameters, bound, self.gradient_norm)

    def _clip_groups(self, bounds: Mapping[str, float]) -> None:
        """Shrink the gradients below each named module to its own bound, and all others together to ``clip_norm``."""
        gradients, squares = self.gradients, {n: norm.square() for n, norm in self.norms(self.gradients).items()}
        members: dict[str, list[str]] = {}
        for name in self._trained:
            members.setdefault(longest_match(name, bounds) or "", []).append(name)
        for group, names in members.items():
            bound = bounds.get(group, self.config.clip_norm)
            norm = torch.stack([squares[name] for name in names]).sum().sqrt()
            if group:
                self.group_norms[f"gradient_norm/{group}"] = norm
            if bound is not None:
                factor = (bound / (norm + 1e-6)).clamp_max(1.0)
                for gradient in (gradients[name] for name in names if name in gradients):
                    gradient.mul_(factor.to(gradient.dtype))

    @cached_property
    def _trained(self) -> dict[str, nn.Parameter]:
        return named_parameters(self.optimizer)

    def _run(self) -> Logs:
        """Run all passes of the micro-batches, accumulating gradients."""
        work, processes = self.work, self.strategy.processes
        loss, trainer = self.passes.loss_function, self.trainer
        step = trainer.step if self.unperturbed is None else trainer.clean_step
        counts = [loss.count(b) if turn.own else 0 for b, turn in zip(work.batches, work.turns, strict=True)]
        (total,) = processes.total([sum(counts)])
        between = work.check if processes.world_size == 1 else None  # processes may run different numbers of passes
        logs: Logs = {}
        for place, (batch, turn, count) in enumerate(zip(work.batches, work.turns, counts, strict=True)):
            if place or self._runs > 1:
                work.check()
            share, last = count / total, place + 1 == len(work.batches)
            weight = {"mean": share, "sum": float(turn.own), "total": float(count)}[work.accumulation]
            self.passes.begin(work.number, place, weight, turn=turn, last=last, check=between, reference=self.reference)
            _add(logs, step(batch, self.passes), share)
        return logs

    def _combine(self, logs: Logs) -> tuple[bool, bool, bool]:
        """Combine the values to log over all processes, and read what must be finite, in one transfer.

        Returns:
            Whether the gradient norm, all losses and all ascents are finite.
        """
        processes, losses = self.strategy.processes, [loss for _, loss in self.passes.losses]
        ascents = [entries for *_, entries in self.passes.ascents]
        summed = {} if processes.world_size == 1 else logs
        norm, *read = _numbers([self.gradient_norm, *losses, *ascents, *summed.values()])
        few, many = len(losses), len(losses) + len(ascents)
        found: list[float] = [not all(map(_is_finite, part)) for part in (read[:few], read[few:many])] + read[many:]
        bad, overflowed, *sums = processes.total(found)
        shared = zip(summed.items(), sums, strict=True)
        self.logs = {name: torch.full_like(value, total) for (name, value), total in shared} if summed else logs
        return _is_finite(norm), not bad, not overflowed

    def _check_finite(self, norm: bool, losses: bool, ascents: bool) -> None:
        """Abort the update if a value is not finite or the loss scaler has found an overflow."""
        if norm and losses and ascents:
            return
        if not self.scaler.is_enabled() or self.passes.precision.loss_scale <= 1.0 or not losses:
            parameters = self.model.named_parameters()
            passes, logs = self.passes, self.logs
            found = describe_nonfinite(passes.losses, logs, parameters, self.work.batches, passes.ascents)
            raise SkippedUpdateError(_first_cause(self.strategy.processes.gather(found)))
        found_inf = overflows(self.scaler, self.optimizer)
        for overflow in found_inf.values() if not ascents else ():
            overflow.fill_(1.0)  # lowers the loss scale
        if any(overflow.item() for overflow in found_inf.values()):
            raise SkippedUpdateError


def _numbers(values: Sequence[Tensor]) -> list[float]:
    """Copy numbers from the device in one transfer."""
    device = values[-1].device
    numbers: list[float] = torch.stack([value.to(device) for value in values]).tolist()
    return numbers


def _is_finite(number: float) -> bool:
    """Return whether a float32 can hold a number."""
    return abs(number) <= _LARGEST


def _first_cause(found: Sequence[str]) -> str:
    """Choose among the processes' findings: a loss before a gradient before the global norm."""
    causes = (text for start in ("the loss", "the gradient") for text in found if text.startswith(start))
    return next(causes, found[0])


def _add(total: Logs, values: Logs, weight: float) -> None:
    for name, value in values.items():
        share = value if weight == 1.0 else value * weight
        total[name] = total[name] + share if name in total else share


def describe_nonfinite(
    losses: Sequence[tuple[int, Tensor]],
    logs: Mapping[str, Tensor],
    parameters: Iterable[tuple[str, nn.Parameter]],
    batches: Sequence[Batch],
    ascents: Sequence[tuple[int, str, Tensor]] = (),
) -> str:
    """Name the first non-finite loss or gradient of an update, with the examples concerned.

    Args:
        losses: micro-batch number and value of every loss of the update, in order.
        logs: the update's values by name, which show which part of a loss is not finite.
        parameters: named parameters with their gradients.
        batches: the update's micro-batches.
        ascents: micro-batch number, modality and sum of every gradient of a perturbation.
    """
    backward = dict.fromkeys(range(len(batches)), 0)
    for micro_batch, loss in losses:
        backward[micro_batch] += 1
        if not torch.isfinite(loss):
            named = ", ".join(name for name, value in logs.items() if not torch.isfinite(value))
            parts = f" (not finite: {named})" if named else ""
            what = f"the loss of backward pass {backward[micro_batch]} is {loss.item()}{parts}"
            return f"{what}; examples: {_ids(batches[micro_batch : micro_batch + 1])}"
    for micro_batch, modality, entries in ascents:
        if not torch.isfinite(entries):
            examples = _ids(batches[micro_batch : micro_batch + 1])
            return f"the gradient of a perturbation ({modality}) is not finite; examples: {examples}"
    for name, parameter in parameters:
        if parameter.grad is not None and not local_part(parameter.grad).isfinite().all():
            return f"the gradient of {name} is not finite; examples: {_ids(batches)}"
    return f"the norm of all gradients together is too large for a float; examples: {_ids(batches)}"


def _ids(batches: Sequence[Batch]) -> str:
    return ", ".join(i for batch in batches for i in batch.ids)
