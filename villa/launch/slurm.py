"""The launcher ``slurm``: jobs of SLURM, through submitit."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from villa.errors import ConfigError
from villa.launch.base import LauncherConfig, Queue, Request
from villa.launch.folder import job_folders, link_logs, prepare, python_command
from villa.launch.following import see_off
from villa.launch.job import RunJob
from villa.launch.slurm_commands import jobs_alive, reason, try_submission
from villa.registry import register_launcher

if TYPE_CHECKING:
    from submitit import Job

#: Blocks signals, then replaces itself by Python with the following arguments.
_BLOCKING = (
    "import os, sys; from signal import *; pthread_sigmask(SIG_BLOCK, [SIGHUP, SIGTERM, SIGUSR2]); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


@dataclass
class SlurmConfig(LauncherConfig):
    """Options of SLURM jobs; null leaves a choice to the cluster.

    Attributes:
        nodes: number of nodes.
        gpus_per_node: GPUs on each node.
        processes_per_node: processes on each node; null is one per GPU, or one without GPUs.
        cpus_per_process: cores of each process.
        memory_gb: main memory of each node.
        partition: the partition.
        account: the account.
        qos: the quality of service.
        constraint: features that the nodes must have.
        timeout_min: time limit in minutes; a run that is not done by then is requeued and resumes.
        signal_s: seconds before the time limit at which the run is told to save its state.
        restarts: how often a run may resume after a time limit; pre-emptions do not count.
        follow: print the log of the first process until the job has ended.
    """

    name: str = "slurm"
    nodes: int = 1
    gpus_per_node: int | None = None
    processes_per_node: int | None = None
    cpus_per_process: int | None = None
    memory_gb: float | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    timeout_min: int = 60
    signal_s: int = 120
    restarts: int = 1000
    follow: bool = False

    @property
    def processes(self) -> int:
        """Number of processes of the whole run."""
        return self.nodes * (self.processes_per_node or self.gpus_per_node or 1)

    def check(self) -> None:
        """Refuse numbers out of range.

        Raises:
            ConfigError: naming the option.
        """
        counts = ("nodes", "gpus_per_node", "processes_per_node", "cpus_per_process", "timeout_min", "signal_s")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"launcher.{name}={value} is too small; give at least 1")
        if self.memory_gb is not None and self.memory_gb <= 0:
            raise ConfigError(f"launcher.memory_gb={self.memory_gb} is too small; give gigabytes of each node")
        if self.restarts < 0:
            raise ConfigError(f"launcher.restarts={self.restarts} is negative; give 0 or more")

    def parameters(self) -> dict[str, Any]:
        """Return the given options by the names of sbatch."""
        values = {
            "nodes": self.nodes,
            "ntasks_per_node": self.processes // self.nodes,
            "gpus_per_node": self.gpus_per_node,
            "cpus_per_task": self.cpus_per_process,
            "mem": None if self.memory_gb is None else f"{round(self.memory_gb * 1024)}M",
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "time": self.timeout_min,
        }
        return {name: value for name, value in values.items() if value is not None}


@register_launcher("slurm")
class Slurm(Queue):
    """Submits runs to SLURM."""

    Config: ClassVar[type[LauncherConfig]] = SlurmConfig
    config: SlurmConfig

    @property
    def follow(self) -> bool:
        """Whether to wait until submitted runs have ended."""
        return self.config.follow

    def check(self, request: Request) -> None:
        """Refuse numbers out of range, and a machine without SLURM.

        Raises:
            ConfigError: saying why.
        """
        self.config.check()
        request.check_processes(self.config.processes)
        if shutil.which("sbatch") is None:
            raise ConfigError("launcher=slurm needs sbatch, which is not installed here; start it on a login node")

    def launch(self, request: Request) -> int:
        """Submit the run, print the job's id, and follow it if asked to.

        Raises:
            ConfigError: there is no SLURM here, or it would refuse the job.
        """
        self.check(request)
        try_submission(self.config.parameters())
        jobs = prepare(request)
        (job,) = self._submit([request], jobs)
        return see_off(job, jobs, "submitted job", follow=self.config.follow)

    def submit(self, requests: Sequence[Request], folder: Path, at_once: int | None) -> list[str]:
        """Submit runs, several of them as one job array."""
        array = f"0-{len(requests) - 1}%{at_once or len(requests)}"
        try_submission(self.config.parameters() | ({"array": array} if len(requests) > 1 else {}))
        folders = [prepare(request) for request in requests]
        jobs = self._submit(requests, folder, at_once)
        for own, job in zip(folders, jobs, strict=True):
            link_logs(own, job)
        return [job.job_id for job in jobs]

    def _submit(self, requests: Sequence[Request], folder: Path, at_once: int | None = None) -> list[Job[int]]:
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = SlurmExecutor(job_folders(folder), max_num_timeout=self.config.restarts, python=python_of_jobs())
        executor.update_parameters(
            **self.config.parameters(),
            job_name=requests[0].configs[-1].name,
            signal_delay_s=self.config.signal_s,
            stderr_to_stdout=True,
            additional_parameters={"requeue": True},
            array_parallelism=at_once or len(requests),
        )
        try:
            with executor.batch():
                return [executor.submit(RunJob(request.inner)) for request in requests]
        except (FailedJobError, FailedSubmissionError) as error:
            raise ConfigError(f"SLURM refuses the job ({reason(str(error))}); change launcher.*") from error

    def alive(self) -> frozenset[str]:
        """Return the ids of the user's pending and running jobs."""
        return jobs_alive()


def python_of_jobs() -> str:
    """Return the shell command of a Python in which signals are blocked until the run can handle them."""
    return f"{shlex.quote(sys.executable)} -ISc {shlex.quote(_BLOCKING)} {shlex.join(python_command()[1:])}".rstrip()
