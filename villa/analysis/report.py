"""The results of attacks: ``robustness.json``, a table for spreadsheets, a figure, and a short table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from villa.analysis.checks import Check
from villa.analysis.robustness import WORDS, Case, Outcome, area, interval
from villa.evaluation.figures import write_figure
from villa.evaluation.groups import SIZES, consensus_scores
from villa.files import atomic_write, write_json
from villa.registry import SHIFT_GROUPS
from villa.tracking import json_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

JSON, CSV, FIGURE = "robustness.json", "robustness.csv", "robustness.png"
SHIFTS_FIGURE = "shifts.png"
#: Most shifts whose intervals are drawn side by side.
_MOST_BARS = 6
#: The worst case of every example.
EXAMPLES = "robustness_examples.jsonl"
#: Every example's scores with other wordings.
REPHRASED = "rephrasings.jsonl"
_COLUMNS = (
    *("modality", "attack", "loss", "norm", "radius", "score", "low", "high", "mean_loss", "success", "size"),
    *("words", "similarity", "forwards", "backwards"),
)
_COLORS = {"noise": "tab:gray", "fgm": "tab:blue", "pgd": "tab:orange", "apgd": "tab:red", "universal": "tab:green"}


@dataclass(frozen=True)
class Clean:
    """Results without an attack.

    Attributes:
        scores: of every example, by id.
        losses: likewise.
    """

    scores: Mapping[str, float]
    losses: Mapping[str, float]


@dataclass(frozen=True)
class Curve:
    """Mean scores by radius, with a 95 % bootstrap interval over examples.

    Attributes:
        modality: what was perturbed.
        label: name of the attack, and of what it raises.
        radii: sizes.
        scores: means over all examples.
        bounds: intervals.
        area: area under the curve; see ``area``.
    """

    modality: str
    label: str
    radii: Sequence[float]
    scores: Sequence[float]
    bounds: Sequence[tuple[float, float]]
    area: float


def curve(label: str, modality: str, radii: Sequence[float], rows: Sequence[Sequence[float]], clean: float) -> Curve:
    """Return the curve of the scores ``rows [examples][radii]``."""
    columns = list(zip(*rows, strict=True))
    means = [mean(column) for column in columns]
    return Curve(modality, label, radii, means, [interval(column) for column in columns], area(radii, means, clean))


def scores_of(outcomes: Sequence[Outcome], clean: Clean, count: int) -> list[list[float]]:
    """Return the scores at every radius of all examples; those that are wrong without an attack stay so."""
    found = {outcome.id: outcome.scores for outcome in outcomes}
    return [found.get(id_, [score] * count) for id_, score in clean.scores.items()]


def worst(outcomes: Mapping[Case, Sequence[Outcome]], clean: Clean, count: int) -> list[list[float]]:
    """Return the lowest score of every example over attacks, at every radius."""
    tables = [scores_of(found, clean, count) for found in outcomes.values()]
    return [[min(values) for values in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]


def worst_texts(outcomes: Mapping[Case, Sequence[Outcome]]) -> dict[str, dict[str, Any]]:
    """Return, by id, the text as it is, the worst one for each budget, and the attack that found it, if it changed."""
    found: dict[str, list[tuple[Case, Outcome]]] = {}
    for case, its in outcomes.items():
        for outcome in its if case.changes_words else ():
            found.setdefault(outcome.id, []).append((case, outcome))
    lines = {}
    for id_, own in found.items():
        best = [min(own, key=lambda one: (one[1].scores[n], -one[1].losses[n])) for n in range(len(own[0][0].radii))]
        lines[id_] = {
            "text": own[0][1].texts[0],
            "worst_texts": [outcome.texts[1 + place] for place, (_, outcome) in enumerate(best)],
            "found_by": [label(case) if outcome.words[n] else None for n, (case, outcome) in enumerate(best)],
        }
    return lines


def curves(outcomes: Mapping[Case, Sequence[Outcome]], clean: Clean) -> list[Curve]:
    """Return the curve of every case and, for each modality, of the worst of all attacks."""
    found, base = [], mean(clean.scores.values())
    for modality in dict.fromkeys(case.modality for case in outcomes):
        own = {case: its for case, its in outcomes.items() if case.modality == modality}
        for case, its in own.items():
            rows = scores_of(its, clean, len(case.radii))
            found.append(curve(label(case), modality, case.radii, rows, base))
        radii = next(iter(own)).radii
        found.append(curve("worst", modality, radii, worst(own, clean, len(radii)), base))
    return found


def label(case: Case) -> str:
    """Return the name of an attack, with what it raises if that is not the task's loss."""
    return case.attack if case.loss == "task" else f"{case.attack}, {case.loss}"


def summary(
    outcomes: Mapping[Case, Sequence[Outcome]],
    clean: Clean,
    found: Sequence[Curve],
    checks: Mapping[str, Sequence[Check]],
    protocol: Mapping[str, Any],
    metric: str,
) -> dict[str, Any]:
    """Return the content of ``robustness.json``; the same arguments give the same."""
    low, high = interval(list(clean.scores.values()))
    return {
        "protocol": dict(protocol),
        "metric": metric,
        "clean": {
            metric: mean(clean.scores.values()),
            "interval": [low, high],
            "loss": json_number(mean(clean.losses.values())),
            "n": len(clean.scores),
        },
        "attacks": [
            entry | {metric: entry["score"]} for case, its in outcomes.items() for entry in _entries(case, its, clean)
        ],
        "worst_case": {
            c.modality: [
                {"radius": radius, metric: score, "interval": list(bounds)}
                for radius, score, bounds in zip(c.radii, c.scores, c.bounds, strict=True)
            ]
            for c in found
            if c.label == "worst"
        },
        "area_under_curve": {
            modality: {c.label: c.area for c in found if c.modality == modality}
            | {"radius_max": next(c.radii[-1] for c in found if c.modality == modality)}
            for modality in dict.fromkeys(c.modality for c in found)
        },
        "checks": {name: [check._asdict() for check in its] for name, its in checks.items()},
    }


def _entries(case: Case, outcomes: Sequence[Outcome], clean: Clean) -> list[dict[str, Any]]:
    rows = scores_of(outcomes, clean, len(case.radii))
    entries = []
    for place, radius in enumerate(case.radii):
        column = [row[place] for row in rows]
        low, high = interval(column)
        fell = [its.scores[place] < clean.scores[its.id] for its in outcomes]
        entries.append(
            {
                "modality": case.modality,
                "attack": case.attack,
                "loss": case.loss,
                "radius": radius,
                "steps": case.steps,
                "restarts": case.restarts,
                "score": mean(column),
                "interval": [low, high],
                "mean_loss": json_number(mean(o.losses[place] for o in outcomes)) if outcomes else None,
                "success_on_correct": mean(fell) if fell else None,
                "size": mean(o.sizes[place] for o in outcomes) if outcomes else None,
                "forwards": mean(o.forwards[place] for o in outcomes) if outcomes else 0,
                "backwards": mean(o.backwards[place] for o in outcomes) if outcomes else 0,
                "n": len(column),
            }
            | (_of_words(outcomes, place) if case.changes_words else {})
        )
    return entries


def _of_words(outcomes: Sequence[Outcome], place: int) -> dict[str, Any]:
    """Return how many words changed, and how similar they are to those before, on average over examples."""
    known = [value for o in outcomes if (value := o.similarities[place]) is not None]
    return {
        "words": mean(o.words[place] for o in outcomes) if outcomes else None,
        "similarity": mean(known) if known else None,
    }


def write(folder: Path, content: Mapping[str, Any], found: Sequence[Curve], norm: str, name: str) -> None:
    """Write the results into a folder."""
    write_json(folder / JSON, content)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for entry in content["attacks"]:
        low, high = entry["interval"]
        values = {**entry, "low": low, "high": high, "success": entry["success_on_correct"]}
        values |= {} if entry["modality"] == WORDS else {"norm": norm}
        writer.writerow([values.get(column) for column in _COLUMNS])
    atomic_write(folder / CSV, buffer.getvalue())
    draw(found, content["clean"], content["metric"], folder / FIGURE, f"{name} (n = {content['clean']['n']})")


def draw(found: Sequence[Curve], clean: Mapping[str, Any], metric: str, output: Path, title: str) -> None:
    """Draw the curves, a panel for each modality."""
    modalities = list(dict.fromkeys(c.modality for c in found))
    figure, panels = panels_of(modalities, metric)
    for axes, modality in zip(panels, modalities, strict=True):
        _panel(axes, [c for c in found if c.modality == modality], clean[metric])
    figure.suptitle(f"{title}; bands: 95 % bootstrap intervals over examples")
    write_figure(figure, output)


def panels_of(modalities: Sequence[str], metric: str) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure with axes for each modality."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(modalities), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Sequence[Axes] = figure.subplots(1, len(modalities), sharey=True, squeeze=False)[0]
    for axes, modality in zip(panels, modalities, strict=True):
        axes.set_title("words changed" if modality == WORDS else f"{modality} perturbed")
    panels[0].set_ylabel(f"{metric.replace('_', ' ')} (%)")
    return figure, panels


def along_radii(axes: Axes, radii: Sequence[float], modality: str) -> None:
    """Finish axes of scores by radius, the first of which is 0; or by how many words may change."""
    if modality != WORDS:
        axes.set_xscale("symlog", linthresh=radii[1])
    axes.set_xticks(radii, [f"{radius:g}" for radius in radii])
    axes.minorticks_off()
    axes.set_xlabel("radius" if modality != WORDS else f"{'share' if radii[-1] < 1 else 'number'} of the words")
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


def _panel(axes: Axes, found: Sequence[Curve], clean: float) -> None:
    axes.axhline(100 * clean, color="black", linewidth=1, linestyle=":", label=f"clean ({100 * clean:.1f} %)")
    for c in found:
        xs, ys = [0.0, *c.radii], [100 * clean, *(100 * score for score in c.scores)]
        style: dict[str, Any] = {"color": _COLORS.get(c.label.partition(",")[0]), "marker": "o", "markersize": 3}
        if c.label == "worst":
            style |= {"color": "black", "linewidth": 2, "zorder": 3}
        if c.label == "noise":
            style |= {"linestyle": "--"}
        if "margin" in c.label:
            style |= {"linestyle": "-."}
        (line,) = axes.plot(xs, ys, label=f"{c.label} (area {100 * c.area:.1f})", **style)
        if c.label in ("worst", "noise"):
            lows, highs = zip(*c.bounds, strict=True)
            axes.fill_between(
                c.radii, [100 * low for low in lows], [100 * high for high in highs], alpha=0.15, color=line.get_color()
            )
    along_radii(axes, [0.0, *found[0].radii], found[0].modality)


def tables(found: Sequence[Curve], clean: Mapping[str, Any], metric: str, title: str) -> list[Table]:
    """Return tables with a row for each attack and modality: scores in percent by radius, and by how many words change.

    Words have a table of their own, if there are other attacks.
    """
    low, high = clean["interval"]
    heading = (
        f"{title}: {metric.replace('_', ' ')} %, clean {100 * clean[metric]:.1f} [{100 * low:.1f}, {100 * high:.1f}], "
        f"n = {clean['n']}"
    )
    of_words = [c for c in found if c.modality == WORDS]
    parts = [("perturbed", [c for c in found if c.modality != WORDS]), ("changed", of_words)]
    return [_table(its, heading, what) for what, its in parts if its]


def _table(found: Sequence[Curve], heading: str, what: str) -> Table:
    shown = Table(title=Text(heading), title_justify="left", box=box.SIMPLE_HEAD)
    for column in (what, "attack"):
        shown.add_column(column)
    for radius in found[0].radii:
        shown.add_column(f"{radius:g}", justify="right")
    shown.add_column("area", justify="right")
    for c in found:
        cells = [f"{100 * score:.1f}" for score in c.scores]
        shown.add_row(c.modality, c.label, *cells, f"{100 * c.area:.1f}", style="bold" if c.label == "worst" else "")
        if c.label == "worst":
            shown.add_section()
    return shown


def verdicts(checks: Mapping[str, Sequence[Check]]) -> list[str]:
    """Return lines on the checks: how many hold, and those that do not."""
    every = [(name, check) for name, its in checks.items() for check in its]
    if not every:
        return []
    held = sum(check.passed for _, check in every)
    lines = [f"checks: {held} of {len(every)} hold"]
    for name, check in every:
        if not check.passed:
            lines.append(f"upper bound only ({name}): not '{check.name}': {check.detail}")
    return lines


def rephrasing_summary(scores: Mapping[str, Sequence[float]], clean: Clean) -> dict[str, Any]:
    """Return the mean score over examples of the mean, and of the lowest one, over their other wordings.

    ``consensus`` has the consensus scores CS(k) by k, of every example's wordings and that of the data.

    Args:
        scores: scores of the other wordings of every example, by id.
        clean: results with the wording of the data.
    """
    base = mean(clean.scores[id_] for id_ in scores)
    groups = [[clean.scores[id_], *own] for id_, own in scores.items()]
    means, lowest = [mean(own) for own in scores.values()], [min(own) for own in scores.values()]
    return {
        "mean": mean(means),
        "interval": list(interval(means)),
        "worst": mean(lowest),
        "worst_interval": list(interval(lowest)),
        "relative_drop": (base - mean(means)) / base if base else 0.0,
        "n": len(scores),
        "texts": sum(map(len, scores.values())),
        "consensus": {str(k): mean(shares) for k in SIZES if (shares := consensus_scores(groups, k))},
    }


def rephrasing_line(values: Mapping[str, Any], metric: str) -> str:
    """Return a line on other wordings."""
    shown = f"{metric.replace('_', ' ')} % {100 * values['mean']:.1f}, of the worst one {100 * values['worst']:.1f}"
    drop = 100 * values["relative_drop"]
    agreed = "".join(f"; CS({k}) {100 * value:.1f} %" for k, value in values["consensus"].items())
    return f"{values['texts']} rephrasings of {values['n']} examples: {shown}; drop {drop:.1f} %{agreed}"


def mean_shift(members: Sequence[Mapping[int, Mapping[str, float]]]) -> dict[int, dict[str, float]]:
    """Return the mean over shifts of every example's scores, by severity."""
    return {
        severity: {id_: mean(member[severity][id_] for member in members) for id_ in scores}
        for severity, scores in members[0].items()
    }


def shift_summary(shifts: Mapping[str, Mapping[int, Mapping[str, float]]], clean: Clean) -> dict[str, Any]:
    """Return, for each shift, the mean score and its interval by severity, their mean, and the relative drop.

    Args:
        shifts: scores by shift, severity and example.
        clean: results without a shift.
    """
    base, found = mean(clean.scores.values()), {}
    for name, severities in shifts.items():
        means = {severity: mean(scores.values()) for severity, scores in severities.items()}
        average = mean(means.values())
        found[name] = {
            **{str(severity): value for severity, value in means.items()},
            "intervals": {str(severity): list(interval(list(its.values()))) for severity, its in severities.items()},
            "mean": average,
            "relative_drop": (base - average) / base if base else 0.0,
        }
    return found


def shift_table(shifts: Mapping[str, Any], metric: str) -> Table:
    """Return a table with a row for each shift: scores in percent by severity, and their mean."""
    title = f"inputs shifted: {metric.replace('_', ' ')} % by severity"
    shown = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    shown.add_column("shift")
    severities = [key for key in next(iter(shifts.values())) if key.isdigit()]
    for heading in (*severities, "mean", "drop %"):
        shown.add_column(heading, justify="right")
    for name, values in shifts.items():
        cells = [f"{100 * values[key]:.1f}" for key in (*severities, "mean", "relative_drop")]
        shown.add_row(Text(name.replace("_", " ")), *cells)
    return shown


def draw_shifts(shifts: Mapping[str, Any], clean: Mapping[str, Any], metric: str, output: Path, title: str) -> None:
    """Draw the scores of shifted inputs by severity, a line for each shift, with 95 % intervals unless there are many.

    Of many, only means over groups of shifts have intervals.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    many = len(shifts) > _MOST_BARS
    figure = Figure(figsize=(8.4 if many else 6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axhline(100 * clean[metric], color="black", linewidth=1, linestyle=":", label="as they are")
    colors = colormaps["tab20" if many else "tab10"].colors  # type: ignore[attr-defined] # a list of colours
    for number, (name, values) in enumerate(shifts.items()):
        severities = [key for key in values if key.isdigit()]
        scores = [100 * values[key] for key in severities]
        style: dict[str, Any] = {"color": colors[number % len(colors)], "marker": "o", "markersize": 3}
        style["label"] = f"{name.replace('_', ' ')} (drop {100 * values['relative_drop']:.1f} %)"
        if name in SHIFT_GROUPS:
            style |= {"color": "black", "linewidth": 2.5, "zorder": 3}
        if many and name not in SHIFT_GROUPS:
            axes.plot([*map(int, severities)], scores, linewidth=1, **style)
            continue
        bounds = [values["intervals"][key] for key in severities]
        below = [[score - 100 * low for score, (low, _) in zip(scores, bounds, strict=True)]]
        above = [[100 * high - score for score, (_, high) in zip(scores, bounds, strict=True)]]
        places = [int(key) + (0 if many else 0.04 * (number - len(shifts) / 2)) for key in severities]
        axes.errorbar(places, scores, yerr=below + above, capsize=2, elinewidth=1, **style)
    axes.set_xlabel("severity")
    axes.set_ylabel(f"{metric.replace('_', ' ')} (%)")
    axes.set_xticks(range(1, len(severities) + 1))
    _finish(axes)
    if many:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title(f"{title} (n = {clean['n']}); bars: 95 % bootstrap intervals", fontsize=10)
    write_figure(figure, output)
