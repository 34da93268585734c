"""This process's rank and world size, from the environment variables of torchrun or other launchers.

``srun`` and ``mpirun`` set variables of their own; ``adopt`` translates them into torchrun's, which all other code
reads. Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from villa.errors import ConfigError, VillaError

#: Variables for world size, rank and local rank, by launcher.
_LAUNCHERS = {
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
}
#: Ports for the steps of a job: below the ephemeral range.
_PORTS = range(12000, 32000)


@dataclass(frozen=True)
class Place:
    """The position of a process in a run.

    Attributes:
        rank: number of the process in the run.
        world_size: number of processes of the run.
        local_rank: number of the process on its machine.
        patience: seconds that the processes wait for each other at the start.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    patience: int = 180

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Place:
        """Read ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``; without them, the process is the only one.

        ``VILLA_START_TIMEOUT`` sets the patience.

        Raises:
            ConfigError: the variables are incomplete or contradict each other.
        """
        world_size = _number(environment, "WORLD_SIZE", 1)
        if world_size < 2:
            return cls()
        needed = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
        if needed:
            raise ConfigError(
                f"WORLD_SIZE is {world_size}, but {' and '.join(needed)} is not set; start the processes with torchrun"
            )
        rank = _number(environment, "RANK", 0)
        if rank >= world_size:
            raise ConfigError(f"RANK is {rank}, but WORLD_SIZE is {world_size}; start the processes with torchrun")
        patience = _number(environment, "VILLA_START_TIMEOUT", cls.patience)
        return cls(rank, world_size, _number(environment, "LOCAL_RANK", 0), patience)


@dataclass(frozen=True)
class Started:
    """Processes started by ``srun`` or ``mpirun``, as seen from one of them.

    Attributes:
        program: the launcher.
        variables: torchrun's variables for this process, as far as known.
        direct: whether all processes are known to have the same command line.
    """

    program: str
    variables: Mapping[str, str]
    direct: bool = False

    @property
    def count(self) -> int:
        """Number of processes."""
        return int(self.variables["WORLD_SIZE"])

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Started | None:
        """Return the started processes, or None under torchrun, for a single process, or in an interactive shell.

        If ``RANK`` and ``WORLD_SIZE`` are set, or ``WORLD_SIZE`` is 1, torchrun's variables apply.

        Raises:
            ConfigError: a variable is not a number.
        """
        if environment.get("RANK") or environment.get("WORLD_SIZE") == "1":
            return None
        srun = _ranks(environment, "srun") if environment.get("SLURM_STEP_ID") else None
        for program in ("mpirun", "mpiexec"):  # before srun, which may have started them
            ranks = _ranks(environment, program)
            if ranks is not None and ranks[:2] != (srun and srun[:2]):
                return cls(program, _variables(*ranks))
        direct = environment.get("SLURM_TASK_PID") == str(os.getpid())
        if srun is None or not _is_task(environment, direct=direct):
            return None
        return cls("srun", _variables(*srun) | _meeting_point(environment), direct)

    def adopt(self, environment: MutableMapping[str, str]) -> None:
        """Set torchrun's variables unless they are set.

        Raises:
            ConfigError: the address of rank 0 is unknown.
        """
        for name, value in self.variables.items():
            environment.setdefault(name, value)
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
        if missing:
            raise ConfigError(
                f"{self.program} has started {self.count} processes, but {' and '.join(missing)}, which say where "
                "they meet, are not set; set them (rank 0's machine, a free port there), or start the processes with "
                "torchrun or srun"
            )

    def refuse(self, error: VillaError) -> NoReturn:
        """Raise an error that all processes hit; if they share a command line, only rank 0 reports it.

        Raises:
            VillaError: the given error.
            SystemExit: another process reports the error.
        """
        if self.direct and self.variables["RANK"] != "0":
            raise SystemExit(error.exit_code)
        raise error


def _ranks(environment: Mapping[str, str], program: str) -> tuple[int, int, int] | None:
    """Return a launcher's world size, rank and local rank, or None without several processes."""
    size, rank, local = _LAUNCHERS[program]
    if not environment.get(rank) or _number(environment, size, 1) < 2:
        return None
    return _number(environment, size, 1), _number(environment, rank, 0), _number(environment, local, 0)


def _variables(size: int, rank: int, local_rank: int) -> dict[str, str]:
    return {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(local_rank)}


def _meeting_point(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the machine of a step's first task, and a port unlikely to be used by another step."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    alone = environment.get("SLURM_STEP_NUM_NODES") == "1" or not nodes
    step = f"{environment.get('SLURM_JOB_ID')}.{environment['SLURM_STEP_ID']}"
    port = _PORTS[zlib.crc32(step.encode()) % len(_PORTS)]
    return {"MASTER_ADDR": "127.0.0.1" if alone else first_node(nodes), "MASTER_PORT": str(port)}


def first_node(nodes: str) -> str:
    """Return the first name of a SLURM node list: ``n08`` of ``n[08-11,15],m3``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else nodes)


def _is_task(environment: Mapping[str, str], *, direct: bool) -> bool:
    """Return whether this process belongs to a task of the step that the variables describe.

    It does not in an interactive shell (``srun --pty``), where only the first task continues, nor in a job submitted
    from a step, whose script inherits the step's variables. Tasks started by srun have no terminal.

    Args:
        environment: the variables.
        direct: whether srun started this very process, or a script that it replaced, rather than a shell.
    """
    in_terminal = bool(environment.get("SLURM_PTY_PORT")) and not direct
    try:
        parent, terminal = _status(environment["SLURM_TASK_PID"])
        daemon = Path(f"/proc/{parent}/cmdline").read_text()
    except (OSError, LookupError):
        return not in_terminal
    of_script = re.search(r"slurmstepd: \[\d+\.(batch|interactive|extern)\]", daemon)
    return not of_script and not (in_terminal and terminal != "0")


def _status(process: str) -> tuple[str, str]:
    """Return a process's parent and the number of its terminal."""
    _, parent, _, _, terminal, *_ = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return parent, terminal


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name) or str(default)
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"the environment variable {name} is '{value}'; it must be a whole number of at least 0")
    return int(value)
