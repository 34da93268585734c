"""A sweep: check its runs, start the unfinished ones, and tabulate the results."""

from __future__ import annotations

import signal
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from villa.config.layers import parse_overrides
from villa.config.loader import load_stages
from villa.config.validate import TRAINING_RUNS
from villa.errors import ConfigError, DataError
from villa.evaluation.figures import write_figure
from villa.files import from_home
from villa.launch.folder import JOBS
from villa.sweeps.axes import Point, refuse_shared_folders
from villa.sweeps.results import FIGURE, MARKDOWN, RUNS, TABLE, group, read_score, sweep_figure, write_tables
from villa.sweeps.running import Job, QueuedRuns, RunProcesses, shared_queue
from villa.sweeps.runs import Run

#: Subfolder of the sweep's folder with the output of the runs.
LOGS = "logs"


class Sweep:
    """The runs of one recipe at several points.

    Args:
        arguments: arguments of ``villa_run`` for all runs.
        points: the points, such as all combinations of some axes' values.
        folder: folder of the sweep, with one for each run; by default ``outputs/<name of the recipe>_sweep``.
        run_types: what runs may do.

    Attributes:
        folder: folder of the sweep.
        runs: all runs, loaded and checked.

    Raises:
        ConfigError: the recipe of a run is wrong, or two runs would have one folder.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        points: Sequence[Point],
        folder: Path | None = None,
        run_types: Collection[str] = TRAINING_RUNS,
    ) -> None:
        refuse_shared_folders(points)
        self.folder = folder or _default_folder(arguments, points[0])
        self.runs = [Run.load(arguments, point, self.folder, run_types) for point in points]
        self._ended = 0

    def run(self, at_once: int | None = None) -> int:
        """Start the unfinished runs; those that were begun are resumed.

        Args:
            at_once: most runs at once; None is one on this machine, and leaves it to a queue.

        Returns:
            0, 1 if a run failed, or 128 + the number of the signal that ended the sweep.

        Raises:
            ConfigError: the launcher refuses a run; nothing was started.
        """
        if at_once is not None and at_once < 1:
            raise ConfigError(f"--at-once {at_once} is too few; give at least 1 run at once")
        waiting = [run for run in self.runs if not run.finished]
        queue = shared_queue(waiting)
        queued = QueuedRuns(self.folder, queue, waiting) if queue else None
        self._ended = len(self.runs) - len(waiting)
        print(f"sweep of {len(self.runs)} runs in {self.folder}: {self._ended} done", flush=True)
        if queue is None or queued is None:
            return self._run_here(waiting, at_once or 1)
        queued.submit(at_once)
        return self._follow(queued) if queue.follow else 0

    def report(self) -> None:
        """Write and print the table, and draw the figure, of the finished runs' ``evaluation.monitor``.

        Raises:
            DataError: a run has no such value.
        """
        last = self.runs[0].configs[-1]
        metric = last.evaluation.monitor
        scores = {run.name: read_score(run.configs[-1], metric) for run in self.runs}
        every = [run.point for run in self.runs]
        text = write_tables(self.folder, every, scores, metric)
        write_figure(sweep_figure(group(every, scores), metric, title=last.name), self.folder / FIGURE)
        print(f"\n{text}\nwritten to {self.folder}: {RUNS}, {TABLE}, {MARKDOWN}, {FIGURE}", flush=True)

    def _run_here(self, waiting: Sequence[Run], at_once: int) -> int:
        failed = []

        def ended(name: str, code: int) -> None:
            self._announce(name, "" if code == 0 else f"failed with exit code {code}, see {self._log(name)}")
            failed.extend([name] * (code != 0))

        processes = RunProcesses(at_once)
        processes.run([Job(run.name, _in_foreground(run), self._log(run.name)) for run in waiting], ended)
        if processes.told is not None:
            name = signal.Signals(processes.told).name
            print(f"ended by {name}; the same command goes on", flush=True)
            return 128 + processes.told
        return int(bool(failed))

    def _follow(self, queued: QueuedRuns) -> int:
        failed = []

        def ended(name: str, done: bool) -> None:
            self._announce(name, "" if done else f"failed, see {self.folder / name / JOBS}")
            failed.extend([name] * (not done))

        try:
            queued.follow(ended)
        except KeyboardInterrupt:
            print("\nthe jobs go on; the same command collects what they reach", flush=True)
        return int(bool(failed))

    def _announce(self, name: str, problem: str) -> None:
        self._ended += 1
        print(f"{self._ended} of {len(self.runs)} {name}: {problem or self._reached(name)}", flush=True)

    def _reached(self, name: str) -> str:
        """Return the score of a run that has ended."""
        config = next(run.configs[-1] for run in self.runs if run.name == name)
        metric = config.evaluation.monitor
        score = None
        with suppress(DataError):  # the report says it
            score = read_score(config, metric)
        if score is None:
            return "done"
        return f"done, {metric.replace('_', ' ')} {score:.4g}{'' if 'loss' in metric else ' %'}"

    def _log(self, name: str) -> Path:
        return self.folder / LOGS / f"{name}.log"


def _in_foreground(run: Run) -> tuple[str, ...]:
    """Return the arguments of a process that waits for the run, whatever its launcher."""
    return (*run.arguments, *(["launcher.follow=true"] if hasattr(run.launcher.config, "follow") else []))


def _default_folder(arguments: Sequence[str], point: Point) -> Path:
    given = parse_overrides(arguments)[1].get("output_dir")
    if given is not None and not given.text:
        raise ConfigError("output_dir= (command line): give the folder of the sweep")
    if given is not None:
        return from_home(str(given.text))
    return Path(f"outputs/{load_stages([*arguments, *point.overrides])[-1].config.name}_sweep")
