"""A study: train what is missing, attack what is trained, and write tables, figures and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from villa.analysis.comparison import Attacked, compare, draw, read
from villa.config.layers import parse_overrides
from villa.config.yaml_text import write
from villa.errors import ConfigError
from villa.files import from_home
from villa.studies.cells import Cells, Place, Row
from villa.studies.curves import curves_of, draw_curves
from villa.studies.page import Page
from villa.studies.recipe import StudyRecipe, read_study, written
from villa.studies.scores import ExampleScores
from villa.studies.tables import Tables
from villa.sweeps.axes import Point
from villa.sweeps.sweep import Sweep

#: Folders in the study's folder.
RUNS, ATTACKS = "runs", "attacks"
_OUTPUT = "output_dir="
#: Options that a trained model does not bring along: where it runs, and whose code.
_PLACES = ("launcher", "device", "user_dir")


class Study:
    """The runs of a study, and what they answer.

    Args:
        path: the study's recipe.
        arguments: arguments of ``villa_run`` for all runs; ``output_dir`` is that of the study.

    Raises:
        ConfigError: the recipe is wrong, or does not make a study.
    """

    def __init__(self, path: str, arguments: Sequence[str] = ()) -> None:
        self.recipe: StudyRecipe = read_study(path)
        named, given = parse_overrides(arguments)
        if named is not None:
            raise ConfigError(f"config={named}: a study names its recipe itself (recipe: ...)")
        output = given["output_dir"].text if "output_dir" in given else self.recipe.output_dir
        if not output:
            raise ConfigError("output_dir= (command line): give the folder of the study")
        self.folder = from_home(str(output))
        others = [argument for argument in arguments if not argument.startswith(_OUTPUT)]
        self.cells = Cells(self.recipe, others, self.folder / RUNS)

    def run(self, at_once: int | None = None) -> int:
        """Run what is missing: tries of settings, then what the tables need, then attacks; then report.

        Args:
            at_once: as for ``Sweep.run``.

        Returns:
            As ``Sweep.run`` does.
        """
        for sweep in (self.tries, self.training, self.attacks):
            found = sweep()
            if found is None:
                continue
            code = found.run(at_once)
            if code:
                return code
            if not all(run.finished for run in found.runs):
                print("the jobs are in the queue; the same command goes on when they have ended", flush=True)
                return 0
        self.report()
        return 0

    def tries(self) -> Sweep | None:
        """Return the runs among whose settings validation chooses."""
        seeds = self.recipe.search_seeds or self.recipe.seeds
        return self._sweep(self.cells.points(self.cells.tries(), seeds))

    def training(self) -> Sweep | None:
        """Return the runs that the tables need; all tries must have ended."""
        return self._sweep(self.cells.points(self.cells.rows(), self.recipe.seeds))

    def attacks(self) -> Sweep | None:
        """Return the attacks on the models of the tables, which must be trained."""
        if self.recipe.robustness is None:
            return None
        points = [self._attack(row, seed) for seed in self.recipe.seeds for row in self._attacked()]
        options = {f"robustness.{key}": value for key, value in self.recipe.robustness.items()}
        places = [argument for argument in self.cells.arguments if argument.startswith(_PLACES)]
        arguments = ["run_type=robustness", *places, *written(options)]
        return Sweep(arguments, points, self.folder / ATTACKS, ("robustness",))

    def report(self) -> None:
        """Write and print what the runs say."""
        scores = ExampleScores(self.cells)
        attacked = {row: self._read(row) for row in self._attacked()} if self.recipe.robustness is not None else {}
        tables = Tables(self.cells, scores, attacked)
        page = Page(self.cells, tables)
        for number, place in enumerate(self.cells.places, 1):
            end = "" if len(self.cells.places) == 1 else f"_{number}"
            rows = self._methods(place)
            found = {method: curves_of(self.cells, row, self.cells.compute(row)) for method, row in rows.items()}
            draw_curves(found, self.folder / f"curves{end}.png", title=place.label or self.recipe.name)
            page.add_curves(place, found, f"curves{end}.png")
            if attacked:
                worst = compare([model for row in rows.values() for model in attacked[row].values()])
                draw(worst, self.folder / f"robustness{end}.png")
                page.add_figure(place, f"robustness{end}.png")
        for name in page.write(self.folder):
            print(f"written: {self.folder / name}", flush=True)

    def _sweep(self, points: Sequence[Point]) -> Sweep | None:
        return Sweep(self.cells.arguments, points, self.folder / RUNS) if points else None

    def _methods(self, place: Place) -> dict[str, Row]:
        """Return the rows of a place at the last budget: matched compute, if that was asked for."""
        budget = self.cells.budgets()[-1]
        return {method: self.cells.row(place, method, budget) for method in self.recipe.methods}

    def _attacked(self) -> list[Row]:
        rows = [
            self.cells.row(place, method, budget)
            for place in self.cells.places
            for budget in self.cells.budgets()
            for method in self.recipe.methods
        ]
        best = [row for place in self.cells.places if (row := self.cells.best(place)) is not None]
        return list(dict.fromkeys([*rows, *best]))

    def _attack(self, row: Row, seed: int) -> Point:
        trained = self.cells.configs(row, seed)[-1].output_dir
        return Point(self.cells.point(row, seed).values, (f"checkpoint.path={write(trained)}",))

    def _read(self, row: Row) -> dict[int, Attacked]:
        folders = {seed: self.folder / ATTACKS / self.cells.point(row, seed).name for seed in self.recipe.seeds}
        return {seed: replace(read(folder), label=row.method) for seed, folder in folders.items()}
