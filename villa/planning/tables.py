"""The tables and the figure of a recipe on many GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from villa.evaluation.figures import write_png
from villa.planning.plan import Plan, in_bytes, in_units
from villa.planning.scale import Row


def method_table(plans: Mapping[str, Plan]) -> Iterator[str]:
    """Yield a table of the operations of an update by method.

    Args:
        plans: by method; the first one is what the others are compared with.
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
        recomputed: the same with activation checkpointing.
    """
    yield "| GPUs | strategy | parameters | gradients | optimiser | activations | peak | peak, layers computed twice |"
    yield "|---|---|---|---|---|---|---|---|"
    for row, again in zip(kept, recomputed, strict=True):
        memory = row.memory
        parts = (memory.parameters, memory.gradients, memory.optimizer, memory.activations, memory.peak)
        sizes = " | ".join(map(in_bytes, (*parts, again.memory.peak)))
        yield f"| {row.gpus:,} | {row.strategy} | {sizes} |"


def time_table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table of what an update takes."""
    yield "| GPUs | strategy | micro-batches a rank | computing | sent by a rank | sending | longer | features read |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        batches = f"{row.micro_batches} x {row.examples:.0f} examples"
        times = f"{_seconds(row.compute)} | {in_bytes(row.sent)} | {_seconds(row.link)} | {row.bound}"
        yield f"| {row.gpus:,} | {row.strategy} | {batches} | {times} | {in_units(row.features, 'B/s')} |"


def draw(rows: Sequence[Row], output: Path) -> None:
    """Write a figure of memory and time against the number of GPUs, a line for each strategy.

    Args:
        rows: by number of GPUs and strategy.
        output: the PNG.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    memory, time = figure.subplots(1, 2)
    for index, strategy in enumerate(dict.fromkeys(row.strategy for row in rows)):
        own, color = [row for row in rows if row.strategy == strategy], f"C{index}"
        gpus = [row.gpus for row in own]
        style = {"color": color, "linewidth": 4 / (1 + index), "marker": "o"}  # lines may lie on each other
        memory.plot(gpus, [row.memory.peak / 2**30 for row in own], label=strategy, **style)
        time.plot(gpus, [row.link for row in own], linestyle="--", label=f"sending, {strategy}", **style)
    own = [row for row in rows if row.strategy == rows[0].strategy]
    time.plot([row.gpus for row in own], [row.compute for row in own], "o-", color="black", label="computing")
    for axes, title in ((memory, "memory of a rank at its peak (GiB)"), (time, "seconds of an update")):
        axes.set(xscale="log", xlabel="GPUs", title=title)
        axes.set_xticks(sorted({row.gpus for row in rows}), labels=[f"{n:,}" for n in sorted({r.gpus for r in rows})])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    memory.set_ylim(bottom=0)
    time.set_yscale("log")
    write_png(figure, output)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.0f} ms"
