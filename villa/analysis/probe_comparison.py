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
    keys = list(dict.fromkeys(key for run in runs for values in run.sums.values() for key in values))
    return [
        {"label": run.label, "selection": selection, "values": _values(first, run, keys, selection)}
        for selection in SELECTIONS
        for run in runs
    ]


def _values(first: Probed, run: Probed, keys: Sequence[str], selection: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in keys:
        name, _, its = key.rpartition("/")
        if its != selection:
            continue
        tables = [np.array([one.sums[image].get(key, (0.0, 0)) for image in first.sums]) for one in (first, run)]
        base, own = (_mean(table.sum(0)) for table in tables)
        entry: dict[str, Any] = {"value": float(own)}
        if run is not first:
            drawn = [
                _mean(tables[1][picks].sum(1)) - _mean(tables[0][picks].sum(1))
                for picks in resamples(len(first.sums), _DRAWS, width=2)
            ]
            low, high = np.quantile(np.concatenate(drawn), (0.025, 0.975))
            entry |= {"difference": float(own - base), "interval": [float(low), float(high)]}
        found[name] = entry
    return found


def _mean(sums: Floats) -> Any:
    """Return means from sums and numbers of pairs in the last dimension; 0 without pairs."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


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
        for key in own[0]["values"]:
            probe, _, kind = key.partition("/")
            cells = [_cell(row["values"].get(key)) for row in own]
            shown.add_row(selection, probe, Text(visible(kind)), *cells, style="bold" if kind == ALL else "")
        shown.add_section()
    return shown


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    if "difference" not in found:
        return f"{found['value']:.3f}"
    low, high = found["interval"]
    return f"{found['value']:.3f}, {found['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
