"""Plan a recipe on many GPUs: memory of a rank by strategy, and what bounds the time of an update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from villa.evaluation.figures import write_figure
from villa.planning.measure import Counted
from villa.planning.plan import Plan, PlannedPart, in_bytes, in_units
from villa.planning.strategies import FULLY_SHARDED, RankMemory, StrategyName, layer_bytes, rank_memory

#: Bytes per value of a stored region feature: the released databases store fp16.
_STORED = 2


@dataclass(frozen=True)
class Cluster:
    """Assumptions about the machines. Rates are per GPU.

    Attributes:
        flops: FLOP/s reached in training; by default 40 % of the 312 TFLOP/s of an A100 in bf16 (data sheet).
        inside: bytes/s sent within a node; by default 300 GB/s (NVLink of an A100, data sheet: 600 GB/s in both
            directions together).
        between: bytes/s sent to other nodes; by default 25 GB/s (InfiniBand HDR, 200 Gbit/s for each GPU).
        per_node: GPUs per node.
    """

    flops: float = 0.4 * 312e12
    inside: float = 300e9
    between: float = 25e9
    per_node: int = 8


@dataclass(frozen=True)
class Row:
    """A recipe on a number of GPUs under a strategy.

    Attributes:
        gpus: number of GPUs, with one rank each.
        strategy: strategy of parallel training.
        memory: memory of a rank.
        micro_batches: micro-batches of a rank per update.
        examples: examples per micro-batch, on average over objectives.
        compute: seconds of computation per update.
        sent: bytes sent by a rank per update.
        link: seconds of communication per update.
        features: bytes/s of region features read by all ranks together.
    """

    gpus: int
    strategy: StrategyName
    memory: RankMemory
    micro_batches: int
    examples: float
    compute: float
    sent: float
    link: float
    features: float

    @property
    def seconds(self) -> float:
        """Seconds of an update with communication overlapped by computation."""
        return max(self.compute, self.link)

    @property
    def bound(self) -> str:
        """What takes longer: ``link`` or ``compute``."""
        return "link" if self.link > self.compute else "compute"


def row(plan: Plan, strategy: StrategyName, gpus: int, cluster: Cluster, image_bytes: float) -> Row:
    """Return what a recipe needs on a number of GPUs.

    If an update has fewer micro-batches than there are GPUs, micro-batches are assumed to be cut so that each GPU has
    one (``batch.per_pass``), with activations and operations in proportion.

    Args:
        plan: the plan of one process.
        strategy: strategy of parallel training.
        gpus: number of GPUs.
        cluster: the machines.
        image_bytes: bytes of the stored features of an example.
    """
    cut = min(1.0, min(part.sample.micro_batches for part in plan.parts) / gpus)
    turns = [math.ceil(part.sample.micro_batches / gpus) for part in plan.parts]
    memories = []
    compute = sent = examples = 0.0
    for part, count in zip(plan.parts, turns, strict=True):
        counted, weight = _scaled(part.counted, cut), part.sample.weight
        memory = rank_memory(counted, plan.model, strategy, gpus, several=count > 1, each_pass=plan.each_pass)
        memories.append(memory)
        compute += weight * count * counted.flops / cluster.flops
        sent += weight * _bytes_sent(plan, strategy, gpus, part, count)
        examples += weight * len(part.sample.batch) * cut
    link = sent / (cluster.inside if gpus <= cluster.per_node else cluster.between)
    largest = max(memories, key=lambda memory: memory.peak)
    read = gpus * max(turns) * examples * image_bytes / max(compute, link)
    return Row(gpus, strategy, largest, max(turns), examples, compute, sent, link, read)


def stored_bytes(regions: int, width: int) -> float:
    """Return the bytes of an image's stored features."""
    return float(regions * width * _STORED)


def _scaled(counted: Counted, part: float) -> Counted:
    """Return the costs of a part of the micro-batch, scaling those that grow with it in proportion."""
    scaled = {name: round(part * getattr(counted, name)) for name in ("activations", "batch", "flops")}
    passes = max(counted.passes - counted.activations, 0) + scaled["activations"]
    return replace(counted, **scaled, passes=passes)


def _bytes_sent(plan: Plan, strategy: StrategyName, gpus: int, part: PlannedPart, micro_batches: int) -> float:
    """Return the bytes that a rank sends per update.

    Ring collectives (Patarasuk and Yuan, 2009) send (n - 1) / n of a tensor for an all-gather or a reduce-scatter, and
    twice as much for an all-reduce. ``ddp`` all-reduces the gradients once per update; ``fairscale_sdp`` sends as much
    to reduce them to their owners and the parameters back. Fully sharded strategies gather a layer whenever it is used
    and all other parameters once per forward pass, and scatter the gradients once per update or backward pass.
    """
    counted, ring = part.counted, (gpus - 1) / gpus
    if strategy not in FULLY_SHARDED:
        return 2 * ring * counted.gradients
    layers = sum(layer_bytes(plan.model))
    gathered = layers * counted.uses + (counted.parameters - layers) * counted.forwards
    reductions = micro_batches * counted.backwards if plan.each_pass else 1
    return ring * (micro_batches * gathered + reductions * counted.gradients)


def method_table(plans: Mapping[str, Plan]) -> Iterator[str]:
    """Yield a table of the operations of an update by method.

    Args:
        plans: plans by method; the others are compared with the first.
    """
    yield "| method | operations of an update | to the first |"
    yield "|---|---|---|"
    first = next(iter(plans.values())).flops
    for name, plan in plans.items():
        yield f"| {name} | {in_units(plan.flops, 'FLOP')} | {plan.flops / first:.2f} |"


def memory_table(kept: Sequence[Row], recomputed: Sequence[Row]) -> Iterator[str]:
    """Yield a table of a rank's memory.

    Args:
        kept: rows by number of GPUs and strategy.
        recomputed: the same rows with activation checkpointing.
    """
    yield "| GPUs | strategy | parameters | gradients | optimiser | activations | peak | peak, layers computed twice |"
    yield "|---|---|---|---|---|---|---|---|"
    for row, again in zip(kept, recomputed, strict=True):
        memory = row.memory
        parts = (memory.parameters, memory.gradients, memory.optimizer, memory.activations, memory.peak)
        sizes = " | ".join(map(in_bytes, (*parts, again.memory.peak)))
        yield f"| {row.gpus:,} | {row.strategy} | {sizes} |"


def time_table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table of the time of an update."""
    yield "| GPUs | strategy | micro-batches a rank | computing | sent by a rank | sending | longer | features read |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        batches = f"{row.micro_batches} x {row.examples:.0f} examples"
        times = f"{_seconds(row.compute)} | {in_bytes(row.sent)} | {_seconds(row.link)} | {row.bound}"
        yield f"| {row.gpus:,} | {row.strategy} | {batches} | {times} | {in_units(row.features, 'B/s')} |"


def draw(rows: Sequence[Row], output: Path, title: str) -> None:
    """Write a figure of memory and time against the number of GPUs, a line for each strategy.

    Args:
        rows: rows by number of GPUs and strategy.
        output: the PNG.
        title: what is planned.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}; planned, not measured")
    memory, time = figure.subplots(1, 2)
    for index, strategy in enumerate(dict.fromkeys(row.strategy for row in rows)):
        own, marker = [row for row in rows if row.strategy == strategy], "os^Dv"[index % 5]
        gpus = [row.gpus * 1.05**index for row in own]  # apart, as lines may coincide
        style = {"color": f"C{index}", "linewidth": 1.5, "marker": marker, "markersize": 9 - 2 * index}
        memory.plot(gpus, [row.memory.peak / 2**30 for row in own], label=strategy, **style)
        time.plot(gpus, [row.link for row in own], linestyle="--", label=f"sending, {strategy}", **style)
    own = [row for row in rows if row.strategy == rows[0].strategy]
    time.plot([row.gpus for row in own], [row.compute for row in own], "o-", color="black", label="computing")
    for axes, heading in ((memory, "memory of a rank at its peak (GiB)"), (time, "seconds of an update")):
        axes.set(xscale="log", xlabel="GPUs", title=heading)
        axes.set_xticks(sorted({row.gpus for row in rows}), labels=[f"{n:,}" for n in sorted({r.gpus for r in rows})])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    memory.set_ylim(bottom=0)
    time.set_yscale("log")
    write_figure(figure, output)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.0f} ms"
