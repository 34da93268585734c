"""Jobs of SLURM, through submitit."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any, ClassVar

from villa.errors import ConfigError
from villa.launch.base import Launcher, LauncherConfig, Request
from villa.launch.folder import prepare
from villa.launch.following import follow
from villa.launch.job import RunJob
from villa.registry import register_launcher


@dataclass
class SlurmConfig(LauncherConfig):
    """Options of SLURM jobs; what is null is left to the cluster.

    Attributes:
        nodes: number of nodes.
        gpus_per_node: GPUs of each, and processes unless ``processes_per_node`` says otherwise.
        processes_per_node: processes on each node; null is one a GPU, or one.
        cpus_per_process: cores of each process.
        memory_gb: main memory of each node.
        partition: the partition.
        account: the account.
        qos: the quality of service.
        constraint: features that the nodes must have.
        timeout_min: time limit in minutes; a run that is not done by then goes on in the next slot.
        signal_s: seconds before the limit at which the run is told to save its state.
        restarts: how often a run may go on after a time limit; pre-emptions do not count.
        follow: show what the first process prints until the job has ended.
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
        """Processes of the whole run."""
        return self.nodes * (self.processes_per_node or self.gpus_per_node or 1)

    def check(self) -> None:
        """Refuse numbers that make no sense.

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
        """The options by the names of sbatch, those that are given."""
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
class Slurm(Launcher):
    """Hands the run over to SLURM."""

    Config: ClassVar[type[LauncherConfig]] = SlurmConfig
    config: SlurmConfig

    def launch(self, request: Request) -> int:
        """Submit the run, print the job's id, and follow it if asked to.

        Raises:
            ConfigError: there is no SLURM here, or it would refuse the job.
        """
        from submitit import SlurmExecutor

        self.config.check()
        request.check_processes(self.config.processes)
        if shutil.which("sbatch") is None:
            raise ConfigError("launcher=slurm needs sbatch, which is not installed here; start it on a login node")
        parameters = self.config.parameters()
        _try(parameters)
        folder = prepare(request)
        executor = SlurmExecutor(folder / "%j", max_num_timeout=self.config.restarts)
        executor.update_parameters(
            **parameters,
            job_name=request.configs[-1].name,
            signal_delay_s=self.config.signal_s,
            stderr_to_stdout=True,
            additional_parameters={"requeue": True},
        )
        job = executor.submit(RunJob(request.inner))
        print(f"submitted job {job.job_id}; its log: {job.paths.stdout}", flush=True)
        return follow(job) if self.config.follow else 0


def _try(parameters: dict[str, Any]) -> None:
    """Ask SLURM whether it would take such a job."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in parameters.items()]
    command = ["sbatch", "--test-only", *options, "--wrap=true"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise ConfigError("SLURM does not answer within a minute; try again, or ask its administrator") from error
    if found.returncode:
        said = found.stderr.strip().splitlines()
        reason = re.sub(r"^(sbatch: error: |allocation failure: )+", "", said[-1] if said else "it does not say why")
        given = " ".join(options)
        raise ConfigError(f"SLURM refuses the job ({reason}); change launcher.* (it was asked for {given})")
