"""The figure of a sweep: a mark a run, and mean and deviation of the runs that differ by their seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from villa.sweeps.results import Group

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE = "figure.png"


def sweep_figure(groups: Sequence[Group], metric: str, *, title: str) -> Figure:
    """Draw groups from the top down, in the order given, with a colour for each value of the first axis.

    Args:
        groups: those without a run that has ended are left out.
        metric: what their scores are.
        title: above the figure.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [group for group in groups if group.scores]
    colors = {first: colormaps["tab10"](i % 10) for i, first in enumerate(dict.fromkeys(map(_first, drawn)))}
    figure = Figure(figsize=(8.5, 1.6 + 0.38 * max(len(drawn), 3)))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, group in enumerate(drawn):
        color = colors[_first(group)]
        axes.plot(group.scores, [row] * len(group.scores), "o", color=color, alpha=0.35, markersize=5)
        axes.errorbar(group.mean or 0.0, row, xerr=group.deviation, fmt="D", color=color, capsize=4, markersize=6)
    axes.set_yticks(range(len(drawn)), [", ".join(group.values.values()) or "all" for group in drawn])
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric.replace('_', ' ')}{'' if metric == 'loss' else ' (%)'}; mean, deviation and every seed")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=11, fontweight="bold")
    return figure


def _first(group: Group) -> str:
    return next(iter(group.values.values()), "")
