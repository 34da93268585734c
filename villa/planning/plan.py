"""The plan of a run: its memory and operations, and their description in a few lines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from villa.config.schema import RunConfig
from villa.models.base import Model
from villa.planning.measure import Counted, count
from villa.planning.samples import Sample
from villa.planning.strategies import RankMemory, StrategyName, rank_memory

_DECIMAL = ("", "k", "M", "G", "T", "P", "E")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def in_bytes(value: float) -> str:
    """Format bytes with three digits: ``1.25 GiB``."""
    return _scaled(value, 1024, _BINARY)


def in_units(value: float, unit: str = "") -> str:
    """Format a value with three digits and a decimal prefix: ``12.3 TFLOP``, ``110 M``."""
    return _scaled(value, 1000, tuple(f"{prefix}{unit}" for prefix in _DECIMAL)).rstrip()


def _scaled(value: float, step: int, units: tuple[str, ...]) -> str:
    power = 0
    while power + 1 < len(units) and abs(value) >= 999.5:
        value, power = value / step, power + 1
    digits = 0 if abs(value) >= 99.95 or not power else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {units[power]}"


@dataclass(frozen=True)
class PlannedPart:
    """One objective of a run, or its task.

    Attributes:
        sample: its micro-batch.
        counted: costs of the micro-batch.
    """

    sample: Sample
    counted: Counted

    @property
    def flops(self) -> int:
        """Floating-point operations of an update on all ranks together."""
        return self.counted.flops * self.sample.micro_batches


@dataclass(frozen=True)
class Plan:
    """The memory and operations of a run.

    Attributes:
        model: the model, on the meta device.
        parts: its objectives, or its task alone.
        strategy: strategy of parallel training.
        processes: number of processes.
        each_pass: whether gradients are reduced after every backward pass.
    """

    model: nn.Module
    parts: Sequence[PlannedPart]
    strategy: StrategyName = "single"
    processes: int = 1
    each_pass: bool = False

    @property
    def memory(self) -> RankMemory:
        """Memory of a rank for the objective that needs most."""
        return self._largest[1]

    @property
    def flops(self) -> float:
        """Floating-point operations of an update on all ranks together; the mean over objectives."""
        return sum(part.sample.weight * part.flops for part in self.parts)

    def lines(self) -> list[str]:
        """Return a readable description of the plan."""
        part, memory = self._largest
        sample, batch = part.sample, part.sample.batch
        every = [p.numel() for p in self.model.parameters()]
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        ranks = f"{self.processes} ranks, {self.strategy}" if self.processes > 1 else "one process"
        kinds = ("parameters", "gradients", "optimizer", "averages", "activations", "gathered")
        named = [f"{kind} {in_bytes(getattr(memory, kind))}" for kind in kinds if getattr(memory, kind)]
        of = f" of {sample.label}" if sample.label and len(self.parts) > 1 else ""
        return [
            f"parameters: {in_units(trained)} trained, {in_units(sum(every))} in all",
            f"memory of a rank ({ranks}): {', '.join(named).replace('optimizer', 'optimiser')}; "
            f"at most {in_bytes(memory.peak)} at once",
            f"  with a micro-batch{of} of {len(batch)} x {sample.length} tokens and regions",
            f"compute of an update: {in_units(self.flops, 'FLOP')}{self._by_objective()}",
            *self._assumed(),
        ]

    def _assumed(self) -> Iterator[str]:
        if any(part.counted.assumed for part in self.parts):
            yield "  as if every number that model, loss or trainer look at (.item()) were 1"

    @property
    def _largest(self) -> tuple[PlannedPart, RankMemory]:
        found = [(part, self._memory(part)) for part in self.parts]
        return max(found, key=lambda pair: pair[1].peak)

    def _memory(self, part: PlannedPart) -> RankMemory:
        several = math.ceil(part.sample.micro_batches / self.processes) > 1
        given = part.counted, self.model, self.strategy, self.processes
        return rank_memory(*given, several=several, each_pass=self.each_pass)

    def _by_objective(self) -> str:
        if len(self.parts) == 1:
            count = self.parts[0].sample.micro_batches
            return f" in {count} micro-batch{'es' * (count > 1)}"
        each = (f"{part.sample.label} {in_units(part.flops, 'FLOP')}" for part in self.parts)
        return f" on average ({', '.join(each)})"


def make_plan(
    config: RunConfig,
    model: Model,
    found: Sequence[Sample],
    *,
    device: str = "cpu",
    strategy: StrategyName = "single",
    processes: int = 1,
) -> Plan:
    """Make a plan by counting the costs of micro-batches.

    Args:
        config: the recipe.
        model: the model, on the meta device.
        found: a micro-batch of every objective.
        device: type of the device whose kernels are assumed, ``cpu`` or ``cuda``.
        strategy: strategy of parallel training.
        processes: number of processes.
    """
    parts = [PlannedPart(sample, count(config, model, sample.batch, device)) for sample in found]
    return Plan(model, parts, strategy, processes, config.distributed.reduce_each_pass)
