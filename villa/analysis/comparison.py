"""Several attacked models side by side: means over seeds, and paired differences on the same examples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from villa.analysis import probe_comparison, probe_report
from villa.analysis.differences import difference
from villa.analysis.report import EXAMPLES, JSON, along_radii, panels_of
from villa.analysis.robustness import area
from villa.errors import ConfigError, DataError, reading
from villa.evaluation.figures import write_figure
from villa.evaluation.results import print_table
from villa.files import from_home, write_json
from villa.json_values import read_own
from villa.streams import visible

#: Where the results of a run are, below its folder.
_BELOW = ("", "robustness")
FIGURE, RESULTS = "comparison.png", "comparison.json"
_OUTPUT = "output_dir="


@dataclass(frozen=True)
class Attacked:
    """The results of one model.

    Attributes:
        label: name of its run, and method.
        content: its ``robustness.json``.
        clean: score of every example without an attack, by id.
        worst: by modality and id, the worst score at every radius.
    """

    label: str
    content: Mapping[str, Any]
    clean: Mapping[str, float]
    worst: Mapping[str, Mapping[str, Sequence[float]]]

    def areas(self, modality: str) -> dict[str, float]:
        """Return the area under the curve of every example."""
        radii = self.radii(modality)
        return {id_: area(radii, scores, self.clean[id_]) for id_, scores in self.worst[modality].items()}

    def radii(self, modality: str) -> list[float]:
        """Return the radii of a modality."""
        return [entry["radius"] for entry in self.content["worst_case"][modality]]


@dataclass(frozen=True)
class Row:
    """Models with one label, which differ in their seed.

    Attributes:
        label: the label.
        models: the models.
        clean: mean and sample deviation of the scores without an attack; the latter None for a single model.
        areas: the same for the areas under the curves of the worst case, by modality.
        differences: by modality, the area's difference from the first row with its 95 % interval.
    """

    label: str
    models: Sequence[Attacked]
    clean: tuple[float, float | None]
    areas: Mapping[str, tuple[float, float | None]]
    differences: Mapping[str, tuple[float, float, float]]


def report(given: Sequence[str]) -> int:
    """Compare runs; print a table and write a figure.

    Args:
        given: folders of runs or of their attacks, and perhaps ``output_dir=...``, where the figure goes;
            ``outputs/comparison`` by default.

    Raises:
        ConfigError: no folder is given, or the output folder is used.
        DataError: the runs cannot be compared.
    """
    folders = [text for text in given if not text.startswith(_OUTPUT)]
    outputs = [text.removeprefix(_OUTPUT) for text in given if text.startswith(_OUTPUT)]
    if not folders:
        raise ConfigError(
            "--compare needs the folders of runs that were attacked (run_type=robustness) or probed (run_type=probe)"
        )
    output = from_home(outputs[-1] if outputs else "outputs/comparison")
    if (output / RESULTS).exists() or (output / probe_comparison.RESULTS).exists():
        raise ConfigError(f"'{output}' holds a comparison; give another output_dir")
    probed = [_probed(from_home(folder)) for folder in folders]
    places = [place for place in probed if place is not None]
    if len(places) == len(folders):
        print_table(probe_comparison.report(places, output))
        print(f"written to {output}: {probe_comparison.RESULTS}")
        if not all(_attacked(from_home(folder)) for folder in folders):
            return 0
    rows = compare([read(from_home(folder)) for folder in folders])
    print_table(table(rows))
    print(f"written to {output}: {', '.join(write(rows, output))}")
    return 0


def read(folder: Path) -> Attacked:
    """Read the results that ``run_type=robustness`` wrote, into the folder or into ``robustness`` below it.

    Raises:
        DataError: there are none, or they are damaged.
    """
    place = _attacked(folder)
    if place is None:
        raise DataError(
            f"'{folder}' has no {JSON}; write it with villa_run run_type=robustness checkpoint.path={folder}"
        )
    clean: dict[str, float] = {}
    worst: dict[str, dict[str, list[float]]] = {}
    with reading(f"'{place}' does not hold the results of attacks", "write them anew with run_type=robustness"):
        content = read_own(place / JSON)
        for line in (place / EXAMPLES).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            clean[record["id"]] = float(record["clean"])
            worst.setdefault(record["modality"], {})[record["id"]] = [float(score) for score in record["worst"]]
        run, metric = content["run"], content["metric"]
        if set(worst) != set(content["worst_case"]) or metric not in content["clean"]:
            raise ValueError("its files are of different attacks")
        label = f"{run['name']} ({run['method']})" if run["name"] != run["method"] else str(run["name"])
    return Attacked(label, content, clean, worst)


def _attacked(folder: Path) -> Path | None:
    """Return where the results of attacks are, or None."""
    return next((folder / name for name in _BELOW if (folder / name / JSON).is_file()), None)


def _probed(folder: Path) -> Path | None:
    """Return where the results of probes are, or None."""
    return next((folder / name for name in ("", "probe") if (folder / name / probe_report.JSON).is_file()), None)


def compare(models: Sequence[Attacked]) -> list[Row]:
    """Group models by label, and compare each group with the first.

    Raises:
        DataError: the models were attacked on other examples, or otherwise.
    """
    first = models[0]
    for model in models[1:]:
        differing = _differing(first, model)
        if differing:
            raise DataError(
                f"'{first.label}' and '{model.label}' were attacked with other {differing}: attack both in the same way"
            )
    groups: dict[str, list[Attacked]] = {}
    for model in models:
        groups.setdefault(model.label, []).append(model)
    base = next(iter(groups.values()))
    rows = []
    for label, its in groups.items():
        areas = {m: _mean([fmean(model.areas(m).values()) for model in its]) for m in first.worst}
        differences = {} if its is base else {m: _difference(base, its, m) for m in first.worst}
        rows.append(Row(label, its, _mean([fmean(model.clean.values()) for model in its]), areas, differences))
    return rows


def _differing(one: Attacked, other: Attacked) -> str | None:
    """Return what differs between two models' attacks; None if they can be compared."""
    if one.clean.keys() != other.clean.keys():
        return "examples"
    if one.content["metric"] != other.content["metric"]:
        return "metrics"
    options = (dict(model.content["protocol"]["robustness"]) for model in (one, other))
    theirs = [{name: value for name, value in each.items() if name not in ("checks", "source")} for each in options]
    return next((f"options (robustness.{name})" for name in theirs[0] if theirs[0][name] != theirs[1].get(name)), None)


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    return fmean(values), stdev(values) if len(values) > 1 else None


def _difference(base: Sequence[Attacked], its: Sequence[Attacked], modality: str) -> tuple[float, float, float]:
    """Return the difference of mean areas and its interval over seeds and examples.

    If the two have other seeds, it is the interval over examples alone.
    """
    ours, theirs = ({int(m.content["run"]["seed"]): m.areas(modality) for m in models} for models in (base, its))
    if ours.keys() != theirs.keys() or len(ours) < len(base) or len(theirs) < len(its):
        ours, theirs = ({0: _means([m.areas(modality) for m in models])} for models in (base, its))
    found = difference(ours, theirs)
    return found.mean, found.low, found.high


def _means(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {id_: fmean(table[id_] for table in tables) for id_ in tables[0]}


def table(rows: Sequence[Row]) -> Table:
    """Return a table: clean score, area under the worst curve by modality, difference from the first row, cost."""
    first = rows[0].models[0]
    metric = str(first.content["metric"]).replace("_", " ")
    title = f"{metric} %, clean and mean over radii (area) of the worst attack; n = {len(first.clean)}"
    shown = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    shown.add_column("run")
    for heading in ("seeds", "clean", *(f"{m}{end}" for m in first.worst for end in (" area", " vs first")), "cost"):
        shown.add_column(heading, justify="right")
    for row in rows:
        cells = [str(len(row.models)), _with_deviation(row.clean)]
        for modality, value in row.areas.items():
            found = row.differences.get(modality)
            interval = "" if found is None else f"{100 * found[0]:+.1f} [{100 * found[1]:+.1f}, {100 * found[2]:+.1f}]"
            cells += [_with_deviation(value), interval]
        shown.add_row(Text(visible(row.label)), *cells, f"{row.models[0].content['run']['cost']:.1f}x")
    return shown


def _with_deviation(value: tuple[float, float | None]) -> str:
    mean, deviation = value
    return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def write(rows: Sequence[Row], folder: Path) -> list[str]:
    """Write a figure and the numbers of the table into a folder; return the names of the files."""
    content = [
        {
            "label": row.label,
            "seeds": [model.content["run"]["seed"] for model in row.models],
            "clean": row.clean,
            "areas": dict(row.areas),
            "differences": {m: {"mean": d[0], "interval": list(d[1:])} for m, d in row.differences.items()},
        }
        for row in rows
    ]
    write_json(folder / RESULTS, content)
    draw(rows, folder / FIGURE)
    return [RESULTS, FIGURE]


def draw(rows: Sequence[Row], output: Path) -> None:
    """Draw the worst curves, a panel for each modality and a line for each row, with a line for every seed."""
    first = rows[0].models[0]
    figure, panels = panels_of(list(first.worst), first.content["metric"])
    for axes, modality in zip(panels, first.worst, strict=True):
        radii = [0.0, *first.radii(modality)]
        for number, row in enumerate(rows):
            lines = [
                [100 * fmean(model.clean.values())]
                + [100 * fmean(column) for column in zip(*model.worst[modality].values(), strict=True)]
                for model in row.models
            ]
            color, several = f"C{number % 10}", len(lines) > 1
            for line in lines if several else ():
                axes.plot(radii, line, color=color, alpha=0.3, linewidth=0.8)
            label = f"{row.label} (area {100 * row.areas[modality][0]:.1f}, {len(lines)} seed{'s' * several})"
            axes.plot(
                radii, [fmean(c) for c in zip(*lines, strict=True)], color=color, marker="o", markersize=3, label=label
            )
        along_radii(axes, radii, modality)
    figure.suptitle(f"Worst of all attacks, n = {len(first.clean)}; thin lines: seeds")
    write_figure(figure, output)
