"""Several processes of this machine, through submitit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from villa.errors import ConfigError
from villa.launch.base import Launcher, LauncherConfig, Request
from villa.launch.folder import prepare
from villa.launch.following import follow
from villa.launch.job import RunJob
from villa.registry import register_launcher

#: Minutes after which submitit ends the processes; it wants a number.
_YEAR = 365 * 24 * 60


@dataclass
class LocalConfig(LauncherConfig):
    """Options of local jobs.

    Attributes:
        processes: how many share the run.
        follow: show what the first process prints until all have ended; false leaves them in the background.
    """

    name: str = "local"
    processes: int = 1
    follow: bool = True


@register_launcher("local")
class Local(Launcher):
    """Starts processes of this machine."""

    Config: ClassVar[type[LauncherConfig]] = LocalConfig
    config: LocalConfig

    def launch(self, request: Request) -> int:
        """Start the processes, and follow them unless told not to.

        Raises:
            ConfigError: fewer than one process.
        """
        from submitit import LocalExecutor

        if self.config.processes < 1:
            raise ConfigError(f"launcher.processes={self.config.processes} is too small; give at least 1")
        request.check_processes(self.config.processes)
        executor = LocalExecutor(prepare(request) / "%j")
        executor.update_parameters(tasks_per_node=self.config.processes, timeout_min=_YEAR)
        job = executor.submit(RunJob(request.inner))
        print(f"started process group {job.job_id}; its log: {job.paths.stdout}", flush=True)
        return follow(job) if self.config.follow else 0
