"""The launcher ``local``: processes on this machine, through submitit."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from villa.errors import ConfigError
from villa.launch.base import Launcher, LauncherConfig, Request
from villa.launch.folder import job_folders, prepare, python_command
from villa.launch.following import see_off
from villa.launch.job import RunJob
from villa.registry import register_launcher

#: Time limit in minutes, which submitit requires.
_YEAR = 365 * 24 * 60
_GPUS = "CUDA_VISIBLE_DEVICES"
#: Environment variable with the effect of Python's option ``-P``: no modules from the working folder.
_SAFE_PATH = "PYTHONSAFEPATH"


@dataclass
class LocalConfig(LauncherConfig):
    """Options of local jobs.

    Attributes:
        processes: number of processes of the run.
        follow: print the log of the first process until all have ended; false leaves them in the background.
    """

    name: str = "local"
    processes: int = 1
    follow: bool = True


@register_launcher("local")
class Local(Launcher):
    """Starts processes on this machine."""

    Config: ClassVar[type[LauncherConfig]] = LocalConfig
    config: LocalConfig

    def check(self, request: Request) -> None:
        """Refuse fewer than one process, and several with ``distributed.strategy=single``.

        Raises:
            ConfigError: naming the option.
        """
        if self.config.processes < 1:
            raise ConfigError(f"launcher.processes={self.config.processes} is too small; give at least 1")
        request.check_processes(self.config.processes)

    def launch(self, request: Request) -> int:
        """Start the processes, and follow them unless told not to.

        Raises:
            ConfigError: as for ``check``.
        """
        from submitit import LocalExecutor

        self.check(request)
        jobs = prepare(request)
        executor = LocalExecutor(job_folders(jobs), python=_python())
        executor.update_parameters(tasks_per_node=self.config.processes, timeout_min=_YEAR, stderr_to_stdout=True)
        with _ignoring_sigint(), _safe_path():
            job = executor.submit(RunJob(request.inner))
        return see_off(job, jobs, "started process group", follow=self.config.follow, local=True)


@contextmanager
def _safe_path() -> Iterator[None]:
    """Make submitit start its own processes like ``python_command`` those of the run."""
    before = os.environ.get(_SAFE_PATH)
    if "-P" in python_command():
        os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        os.environ.pop(_SAFE_PATH, None)
        if before is not None:
            os.environ[_SAFE_PATH] = before


def _python() -> str:
    """Return the command of Python with the GPUs visible here, which submitit would hide."""
    visible = os.environ.get(_GPUS)
    return shlex.join(["env", *(["-u", _GPUS] if visible is None else [f"{_GPUS}={visible}"]), *python_command()])


@contextmanager
def _ignoring_sigint() -> Iterator[None]:
    """Make processes started within ignore SIGINT.

    A terminal sends it to all processes at once, and submitit's would kill the run's a second later; this process asks
    them to end instead.
    """
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
