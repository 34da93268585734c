"""The cells of a study: which runs it takes, and which of them answer under which budget."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from villa.checkpoints.layout import LOG
from villa.config.loader import load_stages
from villa.config.schema import RunConfig
from villa.config.yaml_text import write
from villa.errors import ConfigError, DataError
from villa.planning.dry_run import plan_recipe
from villa.registry import TRAINERS
from villa.studies.recipe import StudyRecipe, written
from villa.sweeps.axes import SEED, Point
from villa.tracking import read_log
from villa.trainers.base import Trainer

UPDATES, COMPUTE, BEST = "matched updates", "matched compute", "best number of updates"
_METHOD, _SETTING, _UPDATES = "method", "setting", "updates"


class Place(NamedTuple):
    """A combination of the axes' values: a data set, a backbone, a share of the data.

    Attributes:
        values: the value of each axis.
        overrides: the overrides for these values.
    """

    values: tuple[tuple[str, str], ...]
    overrides: tuple[str, ...]

    @property
    def label(self) -> str:
        """Its name in tables."""
        return ", ".join(f"{axis} {value}" for axis, value in self.values)


class Row(NamedTuple):
    """Runs that differ in their seed alone.

    Attributes:
        place: where on the axes.
        method: name of the method.
        setting: the setting of its options; None if it has no choice.
        updates: optimiser steps.
    """

    place: Place
    method: str
    setting: str | None
    updates: int


class Price(NamedTuple):
    """What training costs.

    Attributes:
        update: an update of the last stage.
        before: the stages before it, as a whole.
    """

    update: float
    before: float

    def total(self, updates: int) -> float:
        """Return the cost of a training with so many updates of the last stage."""
        return self.before + self.update * updates


@dataclass(frozen=True)
class Cost:
    """What training by a method costs.

    Attributes:
        flops: in counted floating-point operations; None if the model cannot be planned.
        passes: in forward-equivalents relative to standard training.
    """

    flops: Price | None
    passes: Price


class Cells:
    """The rows of a study and their runs.

    Args:
        recipe: the study.
        arguments: further arguments of ``villa_run`` for all runs.
        folder: folder of the runs.
    """

    def __init__(self, recipe: StudyRecipe, arguments: Sequence[str], folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.arguments = [f"config={recipe.recipe}", *written(recipe.options), *arguments]
        self.places = list(_places(recipe))
        self._costs: dict[tuple[Place, str], Cost] = {}
        self._configs: dict[tuple[Row, int], list[RunConfig]] = {}

    def tries(self) -> list[Row]:
        """Return the rows among whose settings validation chooses."""
        return [
            Row(place, method, setting, self.recipe.updates)
            for place in self.places
            for method, settings in self.recipe.settings.items()
            for setting in settings
        ]

    def points(self, rows: Sequence[Row], seeds: Sequence[int]) -> list[Point]:
        """Return the runs of rows, all rows of a seed before the next seed."""
        return [self.point(row, seed) for seed in seeds for row in dict.fromkeys(rows)]

    def point(self, row: Row, seed: int) -> Point:
        """Return a run."""
        values = dict(row.place.values) | {_METHOD: row.method}
        values |= {_SETTING: row.setting} if row.setting else {}
        values |= {_UPDATES: str(row.updates), SEED: str(seed)}
        length = f"{self.recipe.updates_option}={row.updates}"
        own = self.recipe.overrides(row.method, row.setting)
        return Point(values, (*row.place.overrides, f"name={row.method}", *own, length, f"{SEED}={seed}"))

    def configs(self, row: Row, seed: int) -> list[RunConfig]:
        """Return the configuration of every stage of a run."""
        if (row, seed) not in self._configs:
            point = self.point(row, seed)
            values = [*self.arguments, *point.overrides, f"output_dir={write(str(self.folder / point.name))}"]
            self._configs[row, seed] = [stage.config for stage in load_stages(values)]
        return self._configs[row, seed]

    def chosen(self, place: Place, method: str) -> str | None:
        """Return the setting with the best mean validation score; the first one of equals.

        Raises:
            DataError: a run has no validation score.
        """
        settings = list(self.recipe.settings.get(method, {}))
        if len(settings) < 2:
            return settings[0] if settings else None
        seeds = self.recipe.search_seeds or self.recipe.seeds
        rows = {setting: Row(place, method, setting, self.recipe.updates) for setting in settings}
        return max(settings, key=lambda setting: self.validation(rows[setting], seeds))

    def validation(self, row: Row, seeds: Sequence[int]) -> float:
        """Return the mean over seeds of the best validation score; higher is better."""
        return fmean(best_validation(self.configs(row, seed)[-1]) for seed in seeds)

    def cost(self, place: Place, method: str) -> Cost:
        """Return what training by a method costs.

        Raises:
            ConfigError: a stage before the last one does not say how many updates it has.
        """
        if (place, method) not in self._costs:
            row = Row(place, method, self.chosen(place, method), self.recipe.updates)
            stages = self.configs(row, self.recipe.seeds[0])
            values = [*self.arguments, *self.point(row, self.recipe.seeds[0]).overrides]
            counted: list[float] = []
            with suppress(ConfigError):  # a model that cannot be planned
                counted = [plan_recipe(values, stage)[0].flops or 0 for stage in range(len(stages))]
            flops = _price(stages, counted) if counted and all(counted) else None
            self._costs[place, method] = Cost(flops, _price(stages, list(map(_passes, stages))))
        return self._costs[place, method]

    def compute(self, row: Row) -> float:
        """Return the cost of a row's training relative to the first method's at matched updates.

        It is in operations, or in passes if they cannot be counted.
        """
        own, base = self._prices(row.place, row.method, self.recipe.base)
        return own.total(row.updates) / base.total(self.recipe.updates)

    def length(self, place: Place, method: str) -> int:
        """Return the updates of a method at matched compute, of the last stage if there are several.

        Raises:
            ConfigError: the stages before it cost more than that.
        """
        matched, own = self._prices(place, str(self.recipe.match_compute), method)
        left = matched.total(self.recipe.updates) - own.before
        if left < own.update:
            raise ConfigError(
                f"the stages of method '{method}' before the last one cost all that '{self.recipe.match_compute}' "
                "does; give match_compute a method that costs more"
            )
        return round(left / own.update)

    def _prices(self, place: Place, method: str, other: str) -> tuple[Price, Price]:
        """Return what two methods cost, in operations, or in passes if those of one cannot be counted."""
        one, two = self.cost(place, method), self.cost(place, other)
        if one.flops is None or two.flops is None:
            return one.passes, two.passes
        return one.flops, two.flops

    def budgets(self) -> list[str]:
        """Return the names of the budgets of the study."""
        return [UPDATES, *([COMPUTE] if self.recipe.match_compute else [])]

    def row(self, place: Place, method: str, budget: str) -> Row:
        """Return the row of a method under a budget, with the setting that validation chooses."""
        updates = self.recipe.updates if budget == UPDATES else self.length(place, method)
        return Row(place, method, self.chosen(place, method), updates)

    def lengths(self, place: Place) -> list[Row]:
        """Return the rows of the first method among which validation chooses its best number of updates."""
        if not self.recipe.lengths:
            return []
        own = [self.row(place, self.recipe.base, budget) for budget in self.budgets()]
        others = [own[0]._replace(updates=updates) for updates in self.recipe.lengths]
        return sorted(dict.fromkeys([*own, *others]), key=lambda row: row.updates)

    def best(self, place: Place) -> Row | None:
        """Return the row of the first method with its best number of updates by validation, if it was searched."""
        rows = self.lengths(place)
        return max(rows, key=lambda row: self.validation(row, self.recipe.seeds)) if rows else None

    def rows(self) -> list[Row]:
        """Return all rows that the tables need, but for those of tries."""
        answers = [
            self.row(place, method, budget)
            for place in self.places
            for budget in self.budgets()
            for method in self.recipe.methods
        ]
        return list(dict.fromkeys([*answers, *(row for place in self.places for row in self.lengths(place))]))


def _passes(config: RunConfig) -> float:
    """Return the forward-equivalents of an update of a stage."""
    trainer: Trainer = TRAINERS.get(config.trainer.name)(config.trainer)
    return trainer.relative_cost(config.dataset.objectives()) * config.training.passes()


def _price(stages: Sequence[RunConfig], costs: Sequence[float]) -> Price:
    """Return the price of stages, given what an update of each costs."""
    before = 0.0
    for number, (stage, cost) in enumerate(zip(stages[:-1], costs[:-1], strict=True), start=1):
        if stage.training.updates is None:
            raise ConfigError(f"a study counts what every stage costs: give stage{number}.training.updates")
        before += cost * stage.training.updates
    return Price(costs[-1], before)


def best_validation(config: RunConfig) -> float:
    """Return the best validation score of a run; a score of which lower is better with its sign changed.

    Raises:
        DataError: there is none.
    """
    scores = [value for _, value in validations(config)]
    if not scores:
        monitor = config.evaluation.monitor
        raise DataError(f"run '{config.output_dir}' has no validation score '{monitor}', by which a study chooses")
    return max(scores) if config.evaluation.mode == "max" else -min(scores)


def validations(config: RunConfig) -> list[tuple[int, float]]:
    """Return the updates of all validations with their scores."""
    monitor = config.evaluation.monitor
    records = read_log(Path(config.output_dir) / LOG)
    found = [(record["update"], record.get(monitor)) for record in map(dict, records) if record["kind"] == "val"]
    return [(update, value) for update, value in found if isinstance(value, int | float)]


def _places(recipe: StudyRecipe) -> Iterator[Place]:
    for chosen in itertools.product(*(values.items() for values in recipe.axes.values())):
        pairs = zip(recipe.axes, chosen, strict=True)
        named: list[tuple[str, str]] = [(axis, str(value)) for axis, (value, _) in pairs]
        options: Mapping[str, object] = {key: value for _, own in chosen for key, value in (own or {}).items()}
        yield Place(tuple(named), tuple(written(options)))
