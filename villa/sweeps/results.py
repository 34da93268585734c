"""The results of a sweep: one row per run, and mean and deviation over seeds."""

from __future__ import annotations

import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from villa.checkpoints.layout import LOG, METRICS
from villa.config.schema import RunConfig
from villa.engine.run_folder import is_finished
from villa.errors import DataError
from villa.evaluation.results import read_metrics
from villa.files import atomic_write
from villa.sweeps.axes import SEED, Point
from villa.tracking import read_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure


RUNS, TABLE, MARKDOWN = "runs.csv", "table.csv", "table.md"


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        values: value of each axis but the seed.
        scores: score of every finished run, in percent unless it is a loss.
        runs: number of all runs.
    """

    values: Mapping[str, str]
    scores: tuple[float, ...]
    runs: int

    @property
    def mean(self) -> float | None:
        """Mean over the finished runs."""
        return statistics.fmean(self.scores) if self.scores else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation (n - 1); None for fewer than two runs."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


def read_score(config: RunConfig, metric: str) -> float | None:
    """Return the score of a run, in percent unless it is a loss; None if the run is not finished.

    It is the value on the test split, or for ``run_type=train`` the best validation value.

    Raises:
        DataError: the run's results are damaged, or have no such value.
    """
    folder = Path(config.output_dir)
    if not is_finished(config):
        return None
    if config.run_type == "train":
        found = [dict(record) for record in read_log(folder / LOG) if record["kind"] == "val"]
    else:
        content = read_metrics(folder / METRICS, "remove its folder to run it again")
        found = [content.get(config.evaluation.test_split, {})]
    values = [record[metric] for record in found if isinstance(record.get(metric), int | float)]
    if not values:
        known = ", ".join(dict.fromkeys(key for record in found for key in record)) or "none"
        raise DataError(f"run '{folder}' has no value '{metric}' (it has: {known}); name another one")
    best = min(values) if "loss" in metric else max(values)
    return float(best) * (1 if "loss" in metric else 100)


def group(points: Sequence[Point], scores: Mapping[str, float | None]) -> list[Group]:
    """Group runs that differ in their seed alone.

    Args:
        points: the runs.
        scores: score of each run by its name; None if it is not finished.
    """
    together: defaultdict[tuple[tuple[str, str], ...], list[float | None]] = defaultdict(list)
    for point in points:
        together[point.group()].append(scores[point.name])
    return [
        Group(dict(values), tuple(score for score in found if score is not None), len(found))
        for values, found in together.items()
    ]


def write_tables(folder: Path, points: Sequence[Point], scores: Mapping[str, float | None], metric: str) -> str:
    """Write ``runs.csv``, ``table.csv`` and ``table.md``; return the text of the last.

    Args:
        folder: folder of the sweep.
        points: its runs.
        scores: score of each run by its name.
        metric: name of the score.
    """
    axes, groups = list(points[0].values), group(points, scores)
    rows = [[*point.values.values(), _full(scores[point.name])] for point in points]
    atomic_write(folder / RUNS, csv_text([*axes, metric], rows))
    shared = [axis for axis in axes if axis != SEED]
    rows = [[*g.values.values(), _full(g.mean), _full(g.deviation), str(len(g.scores)), str(g.runs)] for g in groups]
    atomic_write(folder / TABLE, csv_text([*shared, "mean", "deviation", "ended", "runs"], rows))
    lines = [[*g.values.values(), _rounded(g), f"{len(g.scores)} of {g.runs}"] for g in groups]
    text = markdown([*shared, metric.replace("_", " "), "runs"], lines)
    atomic_write(folder / MARKDOWN, text)
    return text


def _rounded(found: Group) -> str:
    if found.mean is None:
        return "-"
    deviation = "" if found.deviation is None else f" ± {found.deviation:.2f}"
    return f"{found.mean:.2f}{deviation}"


def _full(value: float | None) -> str:
    return "" if value is None else repr(value)


def csv_text(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([heading, *rows])
    return text.getvalue()


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (heading, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "".join(f"| {line} |\n" for line in lines)


FIGURE = "figure.png"


def sweep_figure(groups: Sequence[Group], metric: str, *, title: str) -> Figure:
    """Draw the groups from the top down, with a colour for each value of the first axis.

    Args:
        groups: the groups; those without finished runs are left out.
        metric: name of the scores.
        title: title of the figure.
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
    axes.set_yticks(
        range(len(drawn)), [f"{', '.join(group.values.values()) or 'all'} (n = {len(group.scores)})" for group in drawn]
    )
    axes.invert_yaxis()
    axes.set_xlabel(
        f"{metric.replace('_', ' ')}{'' if metric == 'loss' else ' (%)'}; dots: runs, bars: a deviation over n of them"
    )
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=11, fontweight="bold")
    return figure


def _first(group: Group) -> str:
    return next(iter(group.values.values()), "")
