"""The runs of a sweep as processes of this machine, several at once."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from villa.launch.folder import python_command
from villa.signals import handled

#: Seconds between looks at the processes.
_PAUSE = 0.2


@dataclass(frozen=True)
class Job:
    """A run to start.

    Attributes:
        name: of the run.
        arguments: of ``villa_run``.
        log: file that gets what it prints; it is added to.
    """

    name: str
    arguments: Sequence[str]
    log: Path


@dataclass
class Processes:
    """Starts processes, at most so many at once, and ends them when this one is told to end.

    Attributes:
        at_once: how many.
        told: number of the signal that asked this process to end, or None.
    """

    at_once: int
    told: int | None = None
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, jobs: Sequence[Job], ended: Callable[[str, int], None]) -> None:
        """Run all jobs; after a signal no other is started, and those that run get SIGTERM and save their state.

        Args:
            jobs: in the order to start them.
            ended: called with the name and exit code of each that has ended.
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

        with handled((signal.SIGTERM, signal.SIGINT), handle):
            yield


def _start(job: Job) -> subprocess.Popen[bytes]:
    """Start a run in a session of its own, so that Ctrl-C reaches it through this process alone."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        return subprocess.Popen(  # noqa: S603
            [*python_command(), "-m", "villa.cli.run", *job.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
