"""Training curves of a study: means over seeds, where they cross, and the gap between training and validation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from villa.checkpoints.layout import LOG
from villa.evaluation.figures import write_figure
from villa.studies.cells import Cells, Row, validations
from villa.tracking import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOSS = "loss"
#: Share of the updates after which training losses count for the gap.
_LATE = 0.8


@dataclass(frozen=True)
class Curve:
    """The validations of a row's runs.

    Attributes:
        metric: name of the score.
        higher_is_better: whether higher scores are better.
        updates: updates of the validations.
        compute: relative operations of the training up to them.
        scores: for each seed, the scores.
        gaps: for each seed, validation loss minus training loss at the end.
    """

    metric: str
    higher_is_better: bool
    updates: Sequence[int]
    compute: Sequence[float]
    scores: Sequence[Sequence[float]]
    gaps: Sequence[float]

    @property
    def means(self) -> list[float]:
        """Means over seeds."""
        return [fmean(column) for column in zip(*self.scores, strict=True)]


def curves_of(cells: Cells, row: Row, compute: float = 1.0) -> Curve:
    """Return the curve of a row.

    Args:
        cells: the runs.
        row: the row.
        compute: operations of its whole training, relative to another one.
    """
    configs = [cells.configs(row, seed)[-1] for seed in cells.recipe.seeds]
    found = [validations(config) for config in configs]
    shared = sorted(set.intersection(*({update for update, _ in one} for one in found)))
    evaluation = configs[0].evaluation
    return Curve(
        evaluation.monitor,
        evaluation.mode == "max",
        shared,
        [compute * update / row.updates for update in shared],
        [[dict(one)[update] for update in shared] for one in found],
        [_gap(Path(config.output_dir) / LOG) for config in configs],
    )


def crossing(base: Curve, other: Curve) -> int | None:
    """Return the first validation from which on the other's mean is always better than the base's; None if none is.

    Only validations after the same number of updates are compared.
    """
    ours, theirs = (dict(zip(curve.updates, curve.means, strict=True)) for curve in (base, other))
    sign = 1 if base.higher_is_better else -1
    found = None
    for update in sorted(ours.keys() & theirs.keys(), reverse=True):
        if sign * (theirs[update] - ours[update]) <= 0:
            break
        found = update
    return found


def draw_curves(curves: Mapping[str, Curve], output: Path, *, title: str) -> None:
    """Draw mean validation scores by updates and by compute, with bands of a deviation over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    first = next(iter(curves.values()))
    scale = 1 if first.metric == _LOSS else 100
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, ("updates", "compute"), strict=True):
        for number, (method, curve) in enumerate(curves.items()):
            _draw(
                axes, getattr(curve, name), [[scale * score for score in one] for one in curve.scores], method, number
            )
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_xlabel("updates")
    panels[1].set_xlabel("compute (1: the first method at matched updates)")
    panels[0].set_ylabel(f"validation {first.metric.replace('_', ' ')}{'' if scale == 1 else ' (%)'}")
    panels[0].legend(fontsize=8)
    seeds = len(first.scores)
    figure.suptitle(
        f"{title}: mean of {seeds} seed{'s' * (seeds > 1)}; bands: a deviation, thin lines: seeds", fontsize=11
    )
    write_figure(figure, output)


def _draw(axes: Axes, places: Sequence[float], scores: Sequence[Sequence[float]], label: str, number: int) -> None:
    columns, color = list(zip(*scores, strict=True)), f"C{number % 10}"
    means = [fmean(column) for column in columns]
    axes.plot(places, means, color=color, marker="o", markersize=3, label=label)
    if len(scores) > 1:
        spread = [stdev(column) for column in columns]
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(places, low, high, color=color, alpha=0.12, linewidth=0)
        for seed in scores:
            axes.plot(places, seed, color=color, alpha=0.3, linewidth=0.6)


def _gap(log: Path) -> float:
    """Return the last validation loss minus the mean training loss of the last fifth of the updates.

    The training loss is that of clean inputs where the method has it, and otherwise that of the inputs it trains on.
    """
    records = [dict(record) for record in read_log(log)]
    train = [(each["update"], each.get("clean_loss", each.get(_LOSS))) for each in records if each["kind"] == "train"]
    last = [loss for update, loss in train if isinstance(loss, float) and update > _LATE * train[-1][0]]
    losses = [each[_LOSS] for each in records if each["kind"] == "val" and isinstance(each.get(_LOSS), float)]
    return losses[-1] - fmean(last) if last and losses else math.nan
