"""The results of probes: ``probe.json``, a table for spreadsheets, a figure, and comparisons of several runs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.table import Table
from rich.text import Text

from villa.analysis.differences import resamples
from villa.analysis.probes import ALL, GROUNDING, PROBES, Floats, Key, Measured
from villa.evaluation.figures import write_figure
from villa.files import atomic_write, write_json
from villa.rng import derive_seed
from villa.streams import visible
from villa.tracking import json_number

JSON, CSV, FIGURE = "probe.json", "probe.csv", "probe.png"
#: The sums of every image at the winning heads, from which runs are compared.
IMAGES = "probe_images.jsonl"
#: Ways of choosing a head: on the pairs that are reported, as in the paper, or on the other half of the images.
Numbers = npt.NDArray[np.int64]
SELECTIONS = ("same", "half")
_DRAWS = 1000
_COLUMNS = (
    "probe",
    "type",
    "selection",
    "pairs",
    "images",
    "value",
    "low",
    "high",
    "random",
    "gap",
    "gap_low",
    "gap_high",
)


@dataclass(frozen=True)
class Sums:
    """The pairs of a key, image by image.

    Attributes:
        direction: who attends to whom.
        linked: ``[images, heads]``.
        counts: ``[images]``.
        random: ``[images, heads]``.
        random_counts: ``[images]``.
        compared: sums of linked pairs that have unlinked ones, ``[images, heads]``.
    """

    direction: str
    linked: Floats
    counts: Floats
    random: Floats
    random_counts: Floats
    compared: Floats

    def means(self, images: Numbers | slice = slice(None)) -> Floats:
        """Return the mean over pairs of some images, ``[heads]``; NaN without pairs."""
        found: Floats = _ratio(self.linked[images].sum(0), self.counts[images].sum())
        return found

    def score(self, head: int, images: Numbers) -> dict[str, Any]:
        """Return the mean of a head over some images, that of unlinked pairs, and 95 % intervals over images."""
        ours, theirs = (
            (sums[:, head], counts) for sums, counts in ((self.linked, self.counts), (self.random, self.random_counts))
        )
        value, random = (_ratio(sums[images].sum(), counts[images].sum()) for sums, counts in (ours, theirs))
        gaps, counts = (self.compared - self.random)[:, head], self.random_counts
        values, gaps_drawn = [], []
        for picks in resamples(len(images), _DRAWS):
            drawn = images[picks]
            values.append(_ratio(ours[0][drawn].sum(1), ours[1][drawn].sum(1)))
            gaps_drawn.append(_ratio(gaps[drawn].sum(1), counts[drawn].sum(1)))
        return {
            "value": json_number(float(value)),
            "interval": _interval(np.concatenate(values)),
            "random": json_number(float(random)),
            "gap": json_number(float(_ratio(gaps[images].sum(), counts[images].sum()))),
            "gap_interval": _interval(np.concatenate(gaps_drawn)),
            "pairs": int(self.counts[images].sum()),
        }


def _ratio(sums: Any, counts: Any) -> Any:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.asarray(counts) > 0, sums / np.asarray(counts, np.float64), np.nan)


def _interval(values: Floats) -> list[float] | None:
    known = values[np.isfinite(values)]
    return [float(bound) for bound in np.quantile(known, (0.025, 0.975))] if len(known) else None


def collect(measured: Sequence[Measured], types: Sequence[str], most: int) -> dict[tuple[str, str], list[Sums]]:
    """Return sums by probe and type, with one entry for each direction.

    Args:
        measured: all texts.
        types: types to report; empty for the ``most`` frequent ones of each probe.
        most: see ``types``.
    """
    images = list(dict.fromkeys(one.image for one in measured))
    place = {image: number for number, image in enumerate(images)}
    counts: dict[tuple[str, str], int] = {}
    sums: dict[Key, list[Any]] = {}
    for one in measured:
        row = place[one.image]
        for key, pairs in one.pairs.items():
            if np.isnan(pairs.linked).all():
                continue
            given = (pairs.linked, pairs.count, pairs.random, pairs.random_count, pairs.compared)
            if key not in sums:
                sums[key] = [np.zeros((len(images), *np.shape(value))) for value in given]
            for part, value in zip(sums[key], given, strict=True):
                part[row] += value
            counts[key[:2]] = counts.get(key[:2], 0) + pairs.count
    found_types: dict[tuple[str, str], list[Sums]] = {}
    for probe in PROBES:
        known = sorted((k for p, k in counts if p == probe and k != ALL), key=lambda k: (-counts[probe, k], k))
        chosen = [kind for kind in types if kind in known] if types else known[:most]
        for kind in [*chosen, ALL] if known else []:
            its = [Sums(key.direction, *parts) for key, parts in sums.items() if key[:2] == (probe, kind)]
            found_types[probe, kind] = its
    return found_types


def winners(sums: Sequence[Sums], names: Sequence[str], halves: tuple[Numbers, Numbers]) -> dict[str, Any]:
    """Return the score of the best head over all layers and directions, chosen in both ways.

    Args:
        sums: one for each direction.
        names: names of the heads.
        halves: images to choose on, and images to report.
    """
    every = np.arange(len(sums[0].counts))
    found: dict[str, Any] = {}
    for selection, (chooses, reports) in zip(SELECTIONS, ((every, every), halves), strict=True):
        tables = np.stack([one.means(chooses) for one in sums])
        if np.isnan(tables).all() or not any(one.counts[reports].sum() for one in sums):
            found[selection] = None
            continue
        way, head = np.unravel_index(int(np.nanargmax(tables)), tables.shape)
        score = sums[int(way)].score(int(head), reports)
        found[selection] = {"head": names[int(head)], "direction": sums[int(way)].direction, **score}
    with np.errstate(invalid="ignore"):
        means = np.stack([one.means() for one in sums])
    found["mean_over_heads"] = json_number(float(np.nanmean(means)))
    found["images"] = int((np.stack([one.counts for one in sums]).sum(0) > 0).sum())
    return found


def split_images(images: Sequence[str], seed: int) -> tuple[Numbers, Numbers]:
    """Return the numbers of two random halves of the images, which depend on their names and the seed alone."""
    order = sorted(range(len(images)), key=lambda number: derive_seed("probe halves", seed, images[number]))
    middle = (len(order) + 1) // 2
    return np.array(sorted(order[:middle]), np.int64), np.array(sorted(order[middle:]), np.int64)


def summary(
    measured: Sequence[Measured], names: Sequence[str], protocol: Mapping[str, Any], options: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the content of ``probe.json``, and a record for each image with its sums at the winning heads.

    Args:
        measured: all texts.
        names: names of the heads, ``layer 3, head 2``.
        protocol: what the results depend on.
        options: the recipe's section ``probe``.
    """
    images = list(dict.fromkeys(one.image for one in measured))
    halves = split_images(images, options.seed)
    results: dict[str, dict[str, Any]] = {}
    records: list[dict[str, Any]] = [{"image": image, "values": {}} for image in images]
    for (probe, kind), sums in collect(measured, options.types, options.most_types).items():
        found = winners(sums, names, halves)
        results.setdefault(probe, {})[kind] = found
        for selection, reports in zip(SELECTIONS, (range(len(images)), halves[1].tolist()), strict=True):
            chosen = found[selection]
            if chosen is None:
                continue
            own = next(one for one in sums if one.direction == chosen["direction"])
            head = names.index(chosen["head"])
            for row in reports:
                if own.counts[row]:
                    value = [float(own.linked[row, head]), int(own.counts[row])]
                    records[row]["values"][f"{probe}/{kind}/{selection}"] = value
    content = {
        "protocol": dict(protocol),
        "texts": len(measured),
        "images": len(images),
        "boxes_with_a_region": sum(one.found for one in measured) / max(1, sum(one.boxes for one in measured)),
        "results": results,
        "importance": _importance(measured, names),
        "fusion": _fusion(measured),
    }
    return content, records


def _importance(measured: Sequence[Measured], names: Sequence[str]) -> dict[str, list[float]]:
    """Return, by head, what the pooled position gives to text and image on average."""
    means = np.mean([one.importance for one in measured], axis=0)
    known = [(name, mean.tolist()) for name, mean in zip(names, means, strict=True)]
    return {name: mean for name, mean in known if np.isfinite(mean).all()}


def _fusion(measured: Sequence[Measured]) -> list[float] | None:
    known = [one.fusion for one in measured if one.fusion]
    return [float(value) for value in np.mean(known, axis=0)] if known else None


def write(folder: Path, content: Mapping[str, Any], records: Sequence[Mapping[str, Any]], name: str) -> None:
    """Write the results into a folder."""
    write_json(folder / JSON, content)
    atomic_write(folder / IMAGES, "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*_COLUMNS, "head", "direction"])
    for probe, kinds in content["results"].items():
        for kind, found in kinds.items():
            for selection in SELECTIONS:
                if found[selection] is not None:
                    writer.writerow(_row(probe, kind, selection, found))
    atomic_write(folder / CSV, buffer.getvalue())
    draw(content, folder / FIGURE, name)


def _row(probe: str, kind: str, selection: str, found: Mapping[str, Any]) -> list[Any]:
    chosen = found[selection]
    (low, high), (gap_low, gap_high) = (chosen[key] or ("", "") for key in ("interval", "gap_interval"))
    numbers = [chosen["value"], low, high, chosen["random"], chosen["gap"], gap_low, gap_high]
    return [probe, kind, selection, chosen["pairs"], found["images"], *numbers, chosen["head"], chosen["direction"]]


def table(content: Mapping[str, Any], title: str) -> Table:
    """Return a table with a row for each type: the best head chosen on all pairs, and chosen on the other half."""
    heading = (
        f"{title}: {content['texts']} texts of {content['images']} images; the best head, as in the paper | chosen "
    )
    shown = Table(
        title=Text(heading + "on one half of the images, shown on the other"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("probe", "type"):
        shown.add_column(heading)
    for heading in ("pairs", "best", "|", "half [95 %]", "random", "gap [95 %]"):
        shown.add_column(heading, justify="right")
    shown.add_column("head (half)")
    for probe, kinds in content["results"].items():
        for kind, found in kinds.items():
            same, half = (found[selection] for selection in SELECTIONS)
            cells = ["", "", "", ""]
            if half is not None:
                cells = [_with(half, "value"), _number(half["random"]), _with(half, "gap", sign="+"), half["head"]]
            pairs, best = (str(same["pairs"]), _number(same["value"])) if same else ("0", "")
            style = "bold" if kind == ALL else ""
            shown.add_row(probe, Text(visible(kind)), pairs, best, "|", *cells, style=style)
        shown.add_section()
    return shown


def _number(value: Any, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if isinstance(value, float) else "-"


def _with(found: Mapping[str, Any], name: str, sign: str = "") -> str:
    bounds = found["interval" if name == "value" else "gap_interval"]
    inner = f" [{bounds[0]:{sign}.3f}, {bounds[1]:{sign}.3f}]" if bounds else ""
    return _number(found[name], sign) + inner


def draw(content: Mapping[str, Any], output: Path, title: str) -> None:
    """Draw linked against unlinked pairs by type (head chosen on the other half), importance and fusion by layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = {probe: kinds for probe, kinds in content["results"].items() if any(f["half"] for f in kinds.values())}
    by_layer = [name for name in ("importance", "fusion") if content[name]]
    count = len(results) + len(by_layer)
    if not count:
        return
    figure = Figure(figsize=(4.4 * count, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes, (probe, kinds) in zip(panels, results.items(), strict=False):
        known = {kind: found["half"] for kind, found in kinds.items() if found["half"]}
        for offset, field, label in ((-0.2, "value", "linked"), (0.2, "random", "unlinked")):
            values = [found[field] or 0.0 for found in known.values()]
            places = [place + offset for place in range(len(known))]
            axes.bar(places, values, 0.38, label=label, color="C0" if field == "value" else "0.75")
        for place, found in enumerate(known.values()):
            if found["interval"]:
                axes.plot([place - 0.2] * 2, found["interval"], color="black", linewidth=1.2)
        axes.set_xticks(range(len(known)), [visible(kind) for kind in known], rotation=35, ha="right", fontsize=8)
        axes.set_title(probe if probe != GROUNDING else "grounding accuracy", fontsize=10)
        axes.set_ylim(top=1.2 * axes.get_ylim()[1])  # room for the legend
        axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper right")
    if content["importance"]:
        _draw_importance(panels[len(results)], content["importance"])
    if content["fusion"]:
        panels[-1].plot(range(len(content["fusion"])), content["fusion"], marker="o", markersize=3)
        panels[-1].set_ylim(0, 1.05)
        panels[-1].set_title("fusion: NMI of clusters and modality\n(lower is more fused)", fontsize=10)
        panels[-1].set_xlabel("layer (0: embedding)")
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, axis="y")
    for axes in panels[len(results) :]:
        axes.xaxis.get_major_locator().set_params(integer=True)
    chosen = "heads chosen on one half of the images, shown on the other; black lines: 95 % intervals"
    figure.suptitle(f"{visible(title)}; {chosen}", fontsize=10)
    write_figure(figure, output)


def _draw_importance(axes: Any, importance: Mapping[str, Sequence[float]]) -> None:
    layers: dict[str, list[float]] = {}
    for name, (text, _) in importance.items():
        layers.setdefault(name.partition(", ")[0], []).append(text)
    for place, values in enumerate(layers.values(), start=1):
        axes.plot([place] * len(values), values, ".", color="C0", alpha=0.5)
    means = [float(np.mean(values)) for values in layers.values()]
    axes.plot(range(1, len(layers) + 1), means, color="C1", marker="o", markersize=3, label="mean of heads")
    axes.set_ylim(0, 1)
    axes.set_xlabel("layer")
    axes.set_title("share of the pooled position's\nattention that text gets", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
