"""A sweep: its runs are checked, started where they are not done, and put into a table."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from villa.config.schema import RunConfig
from villa.config.stages import load_stages
from villa.config.validate import TRAINING_RUNS
from villa.engine.finished import is_finished
from villa.errors import ConfigError, VillaError
from villa.evaluation.figures import write_png
from villa.sweeps.axes import Axis, Point, points
from villa.sweeps.figure import FIGURE, sweep_figure
from villa.sweeps.local import Job, Processes
from villa.sweeps.results import MARKDOWN, RUNS, TABLE, group, read_score, write_tables

#: Folder of what the runs print, below that of the sweep.
LOGS = "logs"


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        point: what is varied there.
        arguments: of ``villa_run``.
        configs: the recipe that they make, or those of its stages.
    """

    point: Point
    arguments: tuple[str, ...]
    configs: Sequence[RunConfig]

    @property
    def finished(self) -> bool:
        """Whether it is done."""
        return all(map(is_finished, self.configs))


class Sweep:
    """Runs of one recipe.

    Args:
        arguments: of ``villa_run``, for all runs.
        axes: what is varied.
        folder: of the sweep; each run has its own below. By default ``outputs/<name of the recipe>_sweep``.

    Attributes:
        folder: of the sweep.
        runs: all of them, loaded and checked.

    Raises:
        ConfigError: the recipe of a run is wrong.
    """

    def __init__(self, arguments: Sequence[str], axes: Sequence[Axis], folder: Path | None = None) -> None:
        found = points(axes)
        self.folder = folder or _default_folder(arguments, found[0])
        self.runs = [self._load(arguments, point) for point in found]

    def run(self, at_once: int = 1) -> int:
        """Do what is not done yet; what is begun goes on.

        Args:
            at_once: how many runs at once.

        Returns:
            0, 1 if a run failed, or 128 + the number of the signal that ended the sweep.
        """
        waiting = [run for run in self.runs if not run.finished]
        print(f"sweep of {len(self.runs)} runs in {self.folder}: {len(self.runs) - len(waiting)} done", flush=True)
        codes: dict[str, int] = {}

        def ended(name: str, code: int) -> None:
            codes[name] = code
            said = "done" if code == 0 else f"failed with exit code {code}, see {self._log(name)}"
            print(f"{len(self.runs) - len(waiting) + len(codes)} of {len(self.runs)} {name}: {said}", flush=True)

        processes = Processes(at_once)
        processes.run([Job(run.point.name, run.arguments, self._log(run.point.name)) for run in waiting], ended)
        if processes.told is not None:
            name = signal.Signals(processes.told).name
            print(f"ended by {name}; the same command goes on", flush=True)
            return 128 + processes.told
        return int(any(codes.values()))

    def report(self) -> None:
        """Write and print the table, and draw the figure, of what the runs that have ended reached.

        It is the metric by which the recipe chooses checkpoints.

        Raises:
            DataError: a run has no such value.
        """
        last = self.runs[0].configs[-1]
        metric = last.evaluation.monitor
        scores = {run.point.name: read_score(run.configs[-1], metric) for run in self.runs}
        every = [run.point for run in self.runs]
        text = write_tables(self.folder, every, scores, metric)
        write_png(sweep_figure(group(every, scores), metric, title=last.name), self.folder / FIGURE)
        print(f"\n{text}\nwritten to {self.folder}: {RUNS}, {TABLE}, {MARKDOWN}, {FIGURE}", flush=True)

    def _load(self, arguments: Sequence[str], point: Point) -> Run:
        own = (*arguments, *point.overrides, f"output_dir={self.folder / point.name}", "logging.progress=off")
        try:
            configs = [stage.config for stage in load_stages(own)]
        except VillaError as error:
            raise type(error)(f"run {point.name}: {error}") from error
        if configs[-1].run_type not in TRAINING_RUNS:
            raise ConfigError(f"run_type={configs[-1].run_type} does not go with a sweep, whose runs train")
        return Run(point, (*own, "checkpoint.resume=true"), configs)

    def _log(self, name: str) -> Path:
        return self.folder / LOGS / f"{name}.log"


def _default_folder(arguments: Sequence[str], point: Point) -> Path:
    given = next((text.partition("=")[2] for text in reversed(arguments) if text.startswith("output_dir=")), None)
    if given == "":
        raise ConfigError("output_dir= (command line): give the folder of the sweep")
    return Path(given or f"outputs/{load_stages([*arguments, *point.overrides])[-1].config.name}_sweep")
