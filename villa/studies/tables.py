"""The numbers of a study: every method under every budget, and its difference from the one it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev

from villa.analysis.comparison import Attacked
from villa.analysis.differences import Difference, Scores, difference
from villa.studies.cells import BEST, Cells, Place, Row
from villa.studies.recipe import Question
from villa.studies.scores import ExampleScores

#: What is measured, besides the areas under the curves of attacks: ``area text`` and so on.
SCORE = "score"
AREA = "area "

COLUMNS = (
    *("question", "place", "budget", "measure", "method", "setting", "updates", "compute", "seeds", "mean"),
    *("deviation", "against", "difference", "low", "high", "detectable"),
)


@dataclass(frozen=True)
class Entry:
    """One method under one budget in the table of a question.

    Attributes:
        question: name of the question.
        place: where on the axes.
        budget: what was matched.
        measure: ``score``, or the area under the curve of attacks on a modality.
        row: the runs.
        compute: operations of the training relative to the first method's at matched updates.
        values: the mean over examples for each seed, in percent.
        against: the method that it is compared with.
        difference: from that method, in percent; None for the method itself.
    """

    question: str
    place: Place
    budget: str
    measure: str
    row: Row
    compute: float
    values: tuple[float, ...]
    against: str
    difference: Difference | None

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds."""
        return stdev(self.values) if len(self.values) > 1 else None

    def cells(self) -> list[str]:
        """Return its line of ``study.csv``."""
        found, row = self.difference, self.row
        what = [self.question, self.place.label, self.budget, self.measure, row.method, row.setting or ""]
        numbers = [self.mean, self.deviation]
        compared = [None] * 4 if found is None else [found.mean, found.low, found.high, found.detectable]
        return [
            *what,
            *(str(row.updates), repr(self.compute), str(len(self.values))),
            *("" if number is None else repr(number) for number in numbers),
            self.against,
            *("" if number is None else repr(number) for number in compared),
        ]


class Tables:
    """All entries of a study.

    Args:
        cells: its runs.
        scores: their scores on the test split.
        attacked: results of attacks by row and seed; empty if there were none.
    """

    def __init__(self, cells: Cells, scores: ExampleScores, attacked: Mapping[Row, Mapping[int, Attacked]]) -> None:
        self.cells, self.scores, self.attacked = cells, scores, attacked

    @cached_property
    def entries(self) -> list[Entry]:
        """All entries, question by question."""
        return [
            entry
            for name, question in self.cells.recipe.questions.items()
            for place in self.cells.places
            for budget, base, others in self._rows(question, place)
            for measure in self.measures()
            for entry in self._compare(name, place, budget, measure, [base, *others])
        ]

    def measures(self) -> list[str]:
        """Return what is measured."""
        first = next(iter(self.attacked.values()), {})
        return [SCORE, *(f"{AREA}{modality}" for modality in next((model.worst for model in first.values()), {}))]

    def _rows(self, question: Question, place: Place) -> Iterator[tuple[str, Row, list[Row]]]:
        """Yield, for each budget, the row to compare with and the others."""
        for budget in self.cells.budgets():
            yield (
                budget,
                self.cells.row(place, question.against, budget),
                [self.cells.row(place, method, budget) for method in question.methods],
            )
        best, last = self.cells.best(place), self.cells.budgets()[-1]
        compared = question.against == self.cells.recipe.base
        if best is not None and compared and best != self.cells.row(place, question.against, last):
            yield BEST, best, [self.cells.row(place, method, last) for method in question.methods]

    def _compare(self, name: str, place: Place, budget: str, measure: str, rows: list[Row]) -> Iterator[Entry]:
        tables = [self._scores(row, measure) for row in rows]
        for row, scores in zip(rows, tables, strict=True):
            values = tuple(fmean(own.values()) for own in scores.values())
            found = None if row is rows[0] else difference(tables[0], scores)
            yield Entry(name, place, budget, measure, row, self.cells.compute(row), values, rows[0].method, found)

    def _scores(self, row: Row, measure: str) -> Scores:
        """Return scores in percent by seed and example."""
        if measure == SCORE:
            found = self.scores.of(row)
        else:
            modality = measure.removeprefix(AREA)
            found = {seed: model.areas(modality) for seed, model in self.attacked[row].items()}
        return {seed: {id_: 100 * value for id_, value in scores.items()} for seed, scores in found.items()}
