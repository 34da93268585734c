"""Execute the runs of a sweep: several processes at once on this machine, or jobs in a queue."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from villa.errors import ConfigError, DataError
from villa.files import open_own, read_json, write_json
from villa.launch.base import Queue
from villa.launch.folder import JOBS, python_command
from villa.signals import handled
from villa.sweeps.runs import Run

#: Seconds between polls of the processes.
_PAUSE = 0.2


@dataclass(frozen=True)
class Job:
    """A run to start as a process.

    Attributes:
        name: name of the run.
        arguments: arguments of ``villa_run``.
        log: file that its output is appended to.
    """

    name: str
    arguments: Sequence[str]
    log: Path


@dataclass
class RunProcesses:
    """Runs jobs as processes, and ends them when this process is told to end.

    Attributes:
        at_once: most processes at once.
        told: number of the signal that told this process to end, or None.
    """

    at_once: int
    told: int | None = None
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, jobs: Sequence[Job], ended: Callable[[str, int], None]) -> None:
        """Run all jobs; after a signal no other is started, and running ones get SIGTERM and save their state.

        Args:
            jobs: the jobs, in the order to start them.
            ended: called with the name and exit code of each job that has ended.
        """
        waiting = list(jobs)
        with self._listening():
            while self._running or (waiting and self.told is None):
                while waiting and self.told is None and len(self._running) < self.at_once:
                    job = waiting.pop(0)
                    self._running[job.name] = _start(job)
                    self._end_if_told()
                for name, code in self._finished():
                    ended(name, code)
                time.sleep(_PAUSE)

    def _finished(self) -> Iterator[tuple[str, int]]:
        for name, process in list(self._running.items()):
            code = process.poll()
            if code is not None:
                del self._running[name]
                yield name, code

    def _end_if_told(self) -> None:
        for process in self._running.values() if self.told is not None else ():
            process.terminate()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        def handle(number: int, frame: FrameType | None) -> None:
            self.told = number
            self._end_if_told()

        with handled((signal.SIGTERM, signal.SIGHUP, signal.SIGINT), handle):
            yield


def _start(job: Job) -> subprocess.Popen[bytes]:
    """Start a run in its own session, so that Ctrl-C reaches it only through this process."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open_own(job.log, "ab") as log:
        return subprocess.Popen(  # noqa: S603
            [*python_command(), "-m", "villa.cli.run", *job.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )


#: File in the sweep's folder with the ids of the jobs, by the names of their runs.
IDS = "jobs.json"
#: Seconds between polls of the queue.
_QUEUE_PAUSE = 5.0


class QueuedRuns:
    """The jobs of a sweep's runs in a queue.

    Args:
        folder: folder of the sweep.
        queue: the queue.
        runs: the unfinished runs.

    Raises:
        ConfigError: the queue does not answer.
        DataError: the file of earlier jobs' ids is damaged.
    """

    def __init__(self, folder: Path, queue: Queue, runs: Sequence[Run]) -> None:
        self._folder, self._queue, self._runs = folder, queue, runs
        self._ids = _read(folder / IDS)
        alive = queue.alive()
        self._new = [run for run in runs if self._ids.get(run.name) not in alive]

    def submit(self, at_once: int | None) -> None:
        """Submit the runs without a pending or running job, as one array.

        Raises:
            ConfigError: the queue refuses it; nothing was submitted.
        """
        kept = len(self._runs) - len(self._new)
        if kept:
            print(f"{kept} of the runs are in the queue already", flush=True)
        if not self._new:
            return
        found = self._queue.submit([run.request for run in self._new], self._folder / JOBS, at_once)
        self._ids |= {run.name: number for run, number in zip(self._new, found, strict=True)}
        write_json(self._folder / IDS, self._ids)
        number, count = found[0].partition("_")[0], len(found)
        limit = f", at most {at_once} at once" if at_once else ""
        print(f"submitted job{' array' * (count > 1)} {number} of {count} run{'s' * (count > 1)}{limit}", flush=True)

    def follow(self, ended: Callable[[str, bool], None]) -> None:
        """Wait until all runs are finished or have failed.

        Args:
            ended: called with the name of each run that has ended, and whether it is finished.

        Raises:
            ConfigError: the queue does not answer.
        """
        waiting, missed = {run.name: run for run in self._runs}, set[str]()
        while waiting:
            time.sleep(_QUEUE_PAUSE)
            alive = self._queue.alive()
            for name, run in list(waiting.items()):
                gone = self._ids[name] not in alive
                if (done := run.finished) or (gone and name in missed):
                    ended(name, done)
                    del waiting[name]
                elif gone:  # its last files may not be visible yet: check once more
                    missed.add(name)


def shared_queue(runs: Sequence[Run]) -> Queue | None:
    """Return the queue that the runs are submitted to, or None if their launcher is not a queue.

    Raises:
        ConfigError: a launcher refuses its run, or the runs' launchers differ in their options.
    """
    launchers = [run.launcher for run in runs]
    for launcher, run in zip(launchers, runs, strict=True):
        launcher.check(run.request)
    queues = [launcher for launcher in launchers if isinstance(launcher, Queue)]
    if queues and any(launcher.config != queues[0].config for launcher in launchers):
        raise ConfigError("--sweep varies launcher, but all runs of a job array have the same; make a sweep of each")
    return queues[0] if queues else None


def _read(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    advice = "remove it if no job of this sweep is in the queue"
    found = read_json(path, "ids of a sweep's jobs", advice)
    if not isinstance(found, Mapping) or not all(isinstance(number, str) for number in found.values()):
        raise DataError(f"'{path}' does not hold the ids of a sweep's jobs; {advice}")
    return dict(found)
