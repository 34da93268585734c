"""The probes of several runs side by side: the table of the VILLA paper, with paired differences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from villa.analysis.differences import resamples
from villa.analysis.probe_report import IMAGES, JSON, SELECTIONS
from villa.analysis.probes import ALL, Floats
from villa.errors import DataError, reading
from villa.files import write_json
from villa.json_values import read_own
from villa.streams import visible

RESULTS = "probe_comparison.json"
#: Stands for the mean over types, each with its own best head, as in the VILLA paper's table.
MEAN = "mean of types"
_DRAWS = 2000
#: Options that may differ between runs that are compared.
_FREE = ("fusion", "weights", "images", "file", "tokenizer")


@dataclass(frozen=True)
class Probed:
    """The probes of one run.

    Attributes:
        label: name of the run, and method.
        content: its ``probe.json``.
        sums: by image and key (``coreference/people/half``), sum and number of pairs at the winning head.
    """

    label: str
    content: Mapping[str, Any]
    sums: Mapping[str, Mapping[str, tuple[float, int]]]


def read(place: Path) -> Probed:
    """Read the results that ``run_type=probe`` wrote into a folder.

    Raises:
        DataError: they are damaged.
    """
    with reading(f"'{place}' does not hold the results of probes", "write them anew with run_type=probe"):
        content = read_own(place / JSON)
        sums = {}
        for line in (place / IMAGES).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            sums[record["image"]] = {key: (float(pair[0]), int(pair[1])) for key, pair in record["values"].items()}
        run = content["run"]
        label = (
            f"{run['name']} ({run['method']})"
            if content["protocol"]["probe"]["weights"] == "trained"
            else (f"{run['name']} (random weights)")
        )
    return Probed(label, content, sums)


def compare(runs: Sequence[Probed]) -> list[dict[str, Any]]:
    """Return, for each run and selection, means by type and their differences from the first run.

    Differences have 95 % intervals by a paired bootstrap over images.

    Raises:
        DataError: the runs were probed on other texts, or otherwise.
    """
    first = runs[0]
    for run in runs[1:]:
        ours, theirs = (
            {key: value for key, value in one.content["protocol"]["probe"].items() if key not in _FREE}
            for one in (first, run)
        )
        differing = next((f"options (probe.{name})" for name in ours if ours[name] != theirs.get(name)), None)
        if first.sums.keys() != run.sums.keys():
            differing = "images"
        if differing is not None:
            raise DataError(
                f"'{first.label}' and '{run.label}' were probed with other {differing}: probe both in the same way"
            )
    listed = [(probe, kind) for run in runs for probe, its in run.content["results"].items() for kind in its]
    listed = sorted(dict.fromkeys(listed), key=lambda one: one[1] == ALL)
    kinds = {probe: [kind for its, kind in listed if its == probe] for probe, _ in listed}
    return [
        {"label": run.label, "selection": selection, "values": _values(first, run, kinds, selection)}
        for selection in SELECTIONS
        for run in runs
    ]


def _values(first: Probed, run: Probed, kinds: Mapping[str, Sequence[str]], selection: str) -> dict[str, Any]:
    """Return the mean of each type, that of all pairs, and the mean over types; none that a model has no maps for."""
    found: dict[str, Any] = {}
    for probe, its in kinds.items():
        of_types: list[tuple[float, Floats]] = []
        for kind in its:
            key = f"{probe}/{kind}/{selection}"
            tables = [np.array([one.sums[image].get(key, (0.0, 0)) for image in first.sums]) for one in (first, run)]
            if not all(table[:, 1].any() for table in tables):
                continue
            base, own = (float(_mean(table.sum(0))) for table in tables)
            drawn = np.zeros(0)
            if run is not first:
                picked = resamples(len(first.sums), _DRAWS, width=2)  # the same ones for every type
                drawn = np.concatenate([_mean(tables[1][p].sum(1)) - _mean(tables[0][p].sum(1)) for p in picked])
            found[f"{probe}/{kind}"] = _entry(own, own - base, drawn)
            if kind != ALL:
                of_types.append((own, np.array([own - base, *drawn])))
        if len(of_types) > 1:
            mean, means = float(np.mean([own for own, _ in of_types])), _mean_of([its for _, its in of_types])
            found[f"{probe}/{MEAN}"] = _entry(mean, float(means[0]), means[1:])
    return found


def _entry(value: float, difference: float, drawn: Floats) -> dict[str, Any]:
    if not len(drawn):
        return {"value": value}
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return {"value": value, "difference": difference, "interval": [float(low), float(high)]}


def _mean(sums: Floats) -> Floats:
    """Return means from sums and numbers of pairs in the last dimension; NaN without pairs."""
    found: Floats = np.where(sums[..., 1] > 0, sums[..., 0] / np.maximum(sums[..., 1], 1), np.nan)
    return found


def _mean_of(values: Sequence[Floats]) -> Floats:
    """Return the mean over types, for each resample over those that occur in it."""
    table = np.stack(values)
    counts = np.isfinite(table).sum(0)
    found: Floats = np.where(counts > 0, np.nansum(table, 0) / np.maximum(counts, 1), np.nan)
    return found


def report(places: Sequence[Path], output: Path) -> Table:
    """Compare the probes of several folders; write the numbers, and return the table."""
    rows = compare([read(place) for place in places])
    write_json(output / RESULTS, rows)
    return table(rows)


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with a row for each type: each run's mean, and its difference from the first run's."""
    shown = Table(
        title=Text(
            "probes: mean over linked pairs at the best head, difference from the first run [95 %]; 'same': head "
            "chosen on the pairs shown, as in the paper; 'half': on the other half of the images"
        ),
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("head", "probe", "type"):
        shown.add_column(heading)
    labels = list(dict.fromkeys(row["label"] for row in rows))
    for label in labels:
        shown.add_column(Text(visible(label)), justify="right")
    for selection in SELECTIONS:
        own = [row for row in rows if row["selection"] == selection]
        for key in dict.fromkeys(key for row in own for key in row["values"]):
            probe, _, kind = key.partition("/")
            cells = [_cell(row["values"].get(key)) for row in own]
            shown.add_row(selection, probe, Text(visible(kind)), *cells, style="bold" if kind in (ALL, MEAN) else "")
        shown.add_section()
    return shown


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    if "difference" not in found:
        return f"{found['value']:.3f}"
    low, high = found["interval"]
    return f"{found['value']:.3f}, {found['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
