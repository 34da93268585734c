"""The page of a study: its tables, and sentences that say of every comparison what its interval carries."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from villa.analysis.differences import Difference
from villa.files import atomic_write
from villa.studies.cells import BEST, COMPUTE, UPDATES, Cells, Place, Row
from villa.studies.curves import Curve, crossing
from villa.studies.recipe import Question
from villa.studies.tables import AREA, COLUMNS, SCORE, Entry, Tables
from villa.sweeps.results import csv_text, markdown

PAGE, TABLE = "study.md", "study.csv"
_BUDGETS = {
    UPDATES: "With as many updates for every method",
    COMPUTE: "With as many operations for every method",
    BEST: "Against `{against}` with its best number of updates by validation, {updates}",
}


class Page:
    """The text of a study.

    Args:
        cells: its runs.
        tables: its numbers.
    """

    def __init__(self, cells: Cells, tables: Tables) -> None:
        self.cells, self.tables = cells, tables
        self._figures: dict[Place, list[str]] = {}

    def add_curves(self, place: Place, curves: Mapping[str, Curve], file: str) -> None:
        """Add a figure of training curves, with what they say."""
        base = self.cells.recipe.base
        lines = [f"![Training curves]({file})\n", "Means of the validation split, without intervals:\n"]
        for method, curve in curves.items():
            gap = f"validation loss minus training loss at the end {_with_deviation(list(curve.gaps), 3)}"
            crossed = "" if method == base else f"{_crossing(method, base, crossing(curves[base], curve))}; "
            lines.append(f"- `{method}`: {crossed}{gap}.")
        self._figures.setdefault(place, []).append("\n".join(lines))

    def add_figure(self, place: Place, file: str) -> None:
        """Add a figure of attacks."""
        self._figures.setdefault(place, []).append(f"![Score by radius of the worst attack]({file})")

    def write(self, folder: Path) -> list[str]:
        """Write the page and a table of all numbers; return the names of the files."""
        atomic_write(folder / TABLE, csv_text(COLUMNS, [entry.cells() for entry in self.tables.entries]))
        atomic_write(folder / PAGE, "\n\n".join(self.blocks()) + "\n")
        return [TABLE, PAGE]

    def blocks(self) -> Iterator[str]:
        """Yield the page's paragraphs."""
        yield f"# {self.cells.recipe.name}"
        yield self._about()
        if len(self.cells.places) > 1:
            yield from self._overview()
        for place in self.cells.places:
            yield from ([f"## {place.label}"] if place.label else [])
            yield self._costs(place)
            for name, question in self.cells.recipe.questions.items():
                yield f"### {question.title}"
                yield from self._answers(name, question, place)
            yield "### Training"
            yield from self._figures.get(place, [])

    def _about(self) -> str:
        recipe, count = self.cells.recipe, sum(entry.difference is not None for entry in self.tables.entries)
        seeds = len(recipe.seeds)
        lines = [
            f"Mean and deviation of {seeds} seed{'s' * (seeds > 1)}, in percent. Differences are paired by seed and "
            "example; their 95 % intervals are for other seeds and other examples"
            + ("." if seeds > 1 else "; those of a single seed hold for this seed alone.")
        ]
        if recipe.settings:
            tries, searched = len(next(iter(recipe.settings.values()))), len(recipe.search_seeds or recipe.seeds)
            lines.append(
                f"Validation chooses among {tries} settings of each method, by {searched} seed{'s' * (searched > 1)}."
            )
        lines.append(
            f"The page makes {count} comparisons, each by itself: without any difference, one interval in twenty would "
            "exclude 0."
        )
        return " ".join(lines)

    def _overview(self) -> Iterator[str]:
        """Yield a table for each question and budget: methods in rows, places in columns, and their mean."""
        places = self.cells.places
        heading = ["method", *(place.label for place in places), "mean"]
        for name, question in self.cells.recipe.questions.items():
            yield f"## {question.title}"
            for budget in self.cells.budgets():
                rows = []
                for method in (question.against, *question.methods):
                    found = [self._score(name, place, budget, method) for place in places]
                    cells = [_with_deviation(entry.values, 2) for entry in found]
                    rows.append([method, *cells, f"{fmean(entry.mean for entry in found):.2f}"])
                yield f"{_BUDGETS[budget]}:"
                yield markdown(heading, rows).rstrip()

    def _score(self, question: str, place: Place, budget: str, method: str) -> Entry:
        wanted = (question, place, budget, SCORE, method)
        return next(
            entry
            for entry in self.tables.entries
            if (entry.question, entry.place, entry.budget, entry.measure, entry.row.method) == wanted
        )

    def _costs(self, place: Place) -> str:
        """Return the table of costs: operations at matched updates, and the updates of every budget."""
        rows, budgets = [], self.cells.budgets()
        for method in self.cells.recipe.methods:
            own = [self.cells.row(place, method, budget) for budget in budgets]
            updates = [str(row.updates) for row in own]
            rows.append([method, own[0].setting or "-", f"{self.cells.compute(own[0]):.2f}x", *updates])
        return markdown(["method", "setting", "cost", *budgets], rows).rstrip()

    def _answers(self, name: str, question: Question, place: Place) -> Iterator[str]:
        entries = [entry for entry in self.tables.entries if (entry.question, entry.place) == (name, place)]
        for budget, its in itertools.groupby(entries, key=lambda entry: entry.budget):
            found = list(its)
            against = found[0]
            yield f"{_BUDGETS[budget].format(against=against.against, updates=against.row.updates)}:"
            yield self._table(found)
            yield "\n".join(f"- {sentence(entry)}" for entry in found if entry.difference is not None)
        base, best = self.cells.recipe.base, self.cells.best(place)
        last = self.cells.budgets()[-1]
        if best is not None and question.against == base and best == self.cells.row(place, base, last):
            yield f"Validation finds no better number of updates for `{base}` than {best.updates}, that of {last}."

    def _table(self, entries: Sequence[Entry]) -> str:
        metric = self.tables.scores.metric(entries[0].row).replace("_", " ")
        measures = list(dict.fromkeys(entry.measure for entry in entries))
        by_row: dict[Row, dict[str, Entry]] = {}
        for entry in entries:
            by_row.setdefault(entry.row, {})[entry.measure] = entry
        heading = ["method", "updates", "compute"]
        for measure in measures:
            heading += [metric if measure == SCORE else measure, "difference"]
        rows = []
        for row, found in by_row.items():
            first = next(iter(found.values()))
            cells = [row.method, str(row.updates), f"{first.compute:.2f}x"]
            for measure in measures:
                cells += [_with_deviation(found[measure].values, 2), _interval(found[measure].difference)]
            rows.append(cells)
        return markdown(heading, rows).rstrip()


def sentence(entry: Entry) -> str:
    """Return what a comparison shows, and no more."""
    found = entry.difference
    assert found is not None, "a method is not compared with itself"
    what = "" if entry.measure == SCORE else f" under attacks on {entry.measure.removeprefix(AREA)}"
    interval = f"{found.mean:+.2f} points [{found.low:+.2f}, {found.high:+.2f}]"
    if found.low == found.high == 0:
        return f"`{entry.row.method}` and `{entry.against}` score the same{what} on every example."
    if found.shown:
        direction = "better" if found.mean > 0 else "worse"
        return f"`{entry.row.method}` is {direction} than `{entry.against}`{what}: {interval}."
    return (
        f"No difference between `{entry.row.method}` and `{entry.against}`{what} is shown: {interval}; "
        f"{found.detectable:.2f} points would have been seen in four of five such studies."
    )


def _crossing(method: str, base: str, update: int | None) -> str:
    if update is None:
        return f"not ahead of `{base}` at the last validation that both have"
    return f"ahead of `{base}` from update {update} to the last validation that both have"


def _interval(found: Difference | None) -> str:
    return "" if found is None else f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def _with_deviation(values: Sequence[float], digits: int) -> str:
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"
