"""Figures of a training run, drawn from its ``log.jsonl``."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from villa.errors import DataError
from villa.files import atomic_write
from villa.tracking import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Points ``(update, value)`` by ``(kind, name)`` of log records.
Curves = dict[tuple[str, str], list[tuple[int, float]]]

_PER_PASS = re.compile(r"pass(?P<step>\d+)/(?:(?P<modality>[\w.]+)_)?(?P<what>\w+)")
_SHADES = {"loss": "Purples", "kl": "Greens", "text": "Blues", "image": "Oranges"}


#: Ratio of the largest to the smallest value from which an axis is logarithmic.
_DECADES = 30


@dataclass(frozen=True)
class _Line:
    """A curve and its style."""

    label: str
    points: list[tuple[int, float]]
    style: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Panel:
    """Axes with their curves, and horizontal lines by name; logarithmic if the values span decades."""

    title: str
    y_label: str
    lines: list[_Line]
    references: Mapping[str, float] = field(default_factory=dict)
    logarithmic: bool = False


def plot_curves(
    log: Path,
    output: Path,
    references: Mapping[str, float] | None = None,
    *,
    title: str | None = None,
    caption: str | None = None,
) -> None:
    """Write ``curves_figure`` as a PNG and a PDF.

    Args:
        log: the run's ``log.jsonl``.
        output: the PNG.
        references: as for ``curves_figure``.
        title: as for ``curves_figure``.
        caption: as for ``curves_figure``.

    Raises:
        DataError: the log is missing, damaged, or has nothing to draw.
        OSError: a file cannot be written.
    """
    write_figure(curves_figure(log, references, title=title, caption=caption), output)


def write_figure(figure: Figure, output: Path) -> None:
    """Write a figure as a PNG, and beside it as a PDF for papers, atomically; the same figure gives the same bytes.

    Args:
        figure: the figure.
        output: the PNG.

    Raises:
        OSError: a file cannot be written.
    """
    import matplotlib

    with matplotlib.rc_context({"pdf.fonttype": 42}):  # text stays text
        for kind, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=130, metadata=metadata)
            atomic_write(output.with_suffix(f".{kind}"), buffer.getvalue())
            figure.set_layout_engine("none")  # what is laid out stays where it is


def curves_figure(
    log: Path,
    references: Mapping[str, float] | None = None,
    *,
    title: str | None = None,
    caption: str | None = None,
) -> Figure:
    """Draw the training curves of a run.

    The panels, as far as the log has their values: losses (total, clean, per pass, validation), validation scores with
    reference lines, learning rate, size of the perturbations relative to the embeddings, and KL divergence to the clean
    prediction.

    Args:
        log: the run's ``log.jsonl``.
        references: scores in [0, 1] by name, as returned by ``TaskDataset.reference_scores``.
        title: title of the figure.
        caption: what is drawn, in a line below.

    Raises:
        DataError: the log is missing, damaged, or has nothing to draw.
    """
    curves = _curves(log)
    panels = [
        _Panel("Loss", "loss", _losses(curves), logarithmic=True),
        _Panel("Validation", "score (%)", _scores(curves), references or {}),
        _Panel("Learning rate", "learning rate", _learning_rate(curves)),
        _Panel("Perturbation size", "|delta| / |embedding| (%)", _sizes(curves)),
        _Panel("KL divergence to the clean prediction", "symmetric KL (nats)", _divergences(curves), logarithmic=True),
    ]
    drawn = [panel for panel in panels if panel.lines]
    if not drawn:
        raise DataError(f"log {log} has no training or validation values to draw; let the run log an update")
    return _figure(drawn, title, caption)


def _curves(log: Path) -> Curves:
    curves: Curves = {}
    for record in read_log(log):
        update, kind = record.pop("update"), record.pop("kind")
        for name, value in record.items():
            curves.setdefault((kind, name), []).append((update, value))
    return curves


def _losses(curves: Curves) -> list[_Line]:
    fixed = {
        ("train", "loss"): _Line("train, total", [], {"color": "black", "linewidth": 1.8, "zorder": 3}),
        ("train", "clean_loss"): _Line("train, clean", [], {"color": "tab:cyan", "linestyle": "--", "zorder": 3}),
        ("val", "loss"): _Line("validation", [], {"color": "tab:red", "marker": "o", "markersize": 4, "zorder": 4}),
        ("val", "live_loss"): _Line("validation, live weights", [], {"color": "tab:red", "linestyle": ":"}),
    }
    found = [_Line(line.label, curves[key], line.style) for key, line in fixed.items() if key in curves]
    return found + list(_per_pass(curves, "loss"))


def _scores(curves: Curves) -> list[_Line]:
    lines = []
    for (kind, name), points in curves.items():
        if kind not in ("val", "test") or name.endswith("loss"):
            continue
        percent = _percent(points)
        update, best = max(percent, key=lambda point: point[1] if math.isfinite(point[1]) else -math.inf)
        found = f"{best:.1f} %" if kind == "test" else f"best {best:.1f} % at {update:,}"
        style: dict[str, Any] = {"marker": "o", "markersize": 4}
        if kind == "test":
            style = {"marker": "*", "markersize": 11, "linestyle": "none"}
        lines.append(_Line(f"{kind} {_words(name)}\n({found})", percent, style))
    return lines


def _learning_rate(curves: Curves) -> list[_Line]:
    points = curves.get(("train", "learning_rate"))
    return [_Line("learning rate", points, {"color": "black"})] if points else []


def _sizes(curves: Curves) -> list[_Line]:
    return [_Line(line.label, _percent(line.points), line.style) for line in _per_pass(curves, "delta")]


def _divergences(curves: Curves) -> list[_Line]:
    return list(_per_pass(curves, "kl"))


def _per_pass(curves: Curves, what: str) -> Iterator[_Line]:
    """Yield lines of ``pass<t>/<what>`` or ``pass<t>/<modality>_<what>``, later passes darker."""
    from matplotlib import colormaps

    matches = [(match, points) for (_, name), points in curves.items() if (match := _PER_PASS.fullmatch(name))]
    last = max((int(match["step"]) for match, _ in matches), default=0)
    for match, points in sorted(matches, key=lambda pair: (pair[0]["modality"] or "", int(pair[0]["step"]))):
        if match["what"] != what:
            continue
        group, step = match["modality"] or what, int(match["step"])
        color = colormaps[_SHADES.get(group.partition(".")[0], "Greys")](0.9 - 0.5 * (last - step) / max(last, 1))
        prefix = f"{group}, " if match["modality"] else ""
        yield _Line(f"{prefix}pass {step}", points, {"color": color, "linewidth": 1.2})


def _figure(panels: list[_Panel], title: str | None, caption: str | None) -> Figure:
    """Arrange the panels in two columns, the last of an odd number in both.

    Without pyplot, which has global state and may need a window.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6.5 * columns, 3.4 * rows + (0.4 if title else 0)))
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.08)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, columns)
    last = max(update for panel in panels for line in panel.lines for update, _ in line.points)
    for position, panel in enumerate(panels):
        row, column = divmod(position, columns)
        alone = position == len(panels) - 1 and column == 0
        axes = figure.add_subplot(grid[row, :] if alone else grid[row, column])
        _draw(axes, panel)
        axes.set_xlim(0, 1.03 * max(last, 1))
    if title:
        figure.suptitle(title, fontweight="bold", parse_math=False)
    if caption:
        figure.supxlabel(caption, fontsize=8, color="dimgrey", parse_math=False)
    return figure


def _draw(axes: Axes, panel: _Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    for line in panel.lines:
        _draw_line(axes, line)
    for index, (name, score) in enumerate(sorted(panel.references.items(), key=lambda item: -item[1])):
        style = ("--", ":", "-.")[index % 3]
        axes.axhline(100 * score, color="grey", linestyle=style, label=f"{_words(name)}\n({100 * score:.1f} %)")
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel("update")
    axes.set_ylabel(panel.y_label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if panel.logarithmic and _spans_decades(panel):
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", scilimits=(-2, 4))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(panel.lines) + len(panel.references) > 1:
        axes.legend(loc="best", fontsize=7, framealpha=0.7, edgecolor="none")


def _spans_decades(panel: _Panel) -> bool:
    """Return whether values above 0, as losses are, differ by more than a linear axis shows."""
    values = [value for line in panel.lines for _, value in line.points if math.isfinite(value)]
    return bool(values) and min(values) > 0 and max(values) > _DECADES * min(values)


def _draw_line(axes: Axes, line: _Line) -> None:
    """Draw the finite values, label how many are not finite, and mark the points if there are few."""
    finite = [(update, value) for update, value in line.points if math.isfinite(value)]
    left_out = len(line.points) - len(finite)
    label = f"{line.label}\n({left_out} not finite)" if left_out else line.label
    markers = {"marker": "o", "markersize": 3} if len(finite) <= 20 else {}
    axes.plot(*zip(*finite, strict=True) if finite else ([], []), label=label, **{**markers, **line.style})


def _percent(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(update, 100 * value) for update, value in points]


def _words(name: str) -> str:
    return name.replace("_", " ")
