"""Which process this is, as ``torchrun`` and its like say in environment variables. Nothing here imports torch.

``srun`` and ``mpirun`` have variables of their own; ``adopt`` says the same in those of torchrun, which are all that is
read elsewhere.
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

#: By the program that starts processes: the variables for their number, one's rank, and its rank on its machine.
_LAUNCHERS = {
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
}
#: Ports that a step of a job may get: below those that systems give to connections.
_PORTS = range(12000, 32000)


@dataclass(frozen=True)
class Place:
    """A process among those of a run.

    Attributes:
        rank: its number.
        world_size: how many there are.
        local_rank: its number on this machine.
        patience: seconds that the processes wait for each other at the start.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    patience: int = 180

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Place:
        """Return the place that ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` say; without them there is one process.

        ``VILLA_START_TIMEOUT`` is its patience.

        Raises:
            ConfigError: they are incomplete, or contradict each other.
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
    """Several processes that ``srun`` or ``mpirun`` has started, seen from one of them.

    Attributes:
        program: which of the two.
        variables: torchrun's variables for this process, as far as they are known.
        direct: whether it is known that all of them got the same command line.
    """

    program: str
    variables: Mapping[str, str]
    direct: bool = False

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.variables["WORLD_SIZE"])

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Started | None:
        """Return what was started, or None: by torchrun, for one process, or for a shell in a terminal.

        Processes whose ``RANK`` and ``WORLD_SIZE`` are set, or whose ``WORLD_SIZE`` is 1, are torchrun's.

        Raises:
            ConfigError: a variable is no number.
        """
        if environment.get("RANK") or environment.get("WORLD_SIZE") == "1":
            return None
        srun = _ranks(environment, "srun") if environment.get("SLURM_STEP_ID") else None
        for program in ("mpirun", "mpiexec"):  # they may have been started by srun themselves, which tells them so, too
            ranks = _ranks(environment, program)
            if ranks is not None and ranks[:2] != (srun and srun[:2]):
                return cls(program, _variables(*ranks))
        direct = environment.get("SLURM_TASK_PID") == str(os.getpid())
        if srun is None or not _is_task(environment, direct=direct):
            return None
        return cls("srun", _variables(*srun) | _meeting_point(environment), direct)

    def adopt(self, environment: MutableMapping[str, str]) -> None:
        """Set torchrun's variables where they are not set.

        Raises:
            ConfigError: where to meet is not known.
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
        """Raise an error that all of them meet; one says it for all, where all got the same command line.

        Raises:
            VillaError: what is given.
            SystemExit: another one says it.
        """
        if self.direct and self.variables["RANK"] != "0":
            raise SystemExit(error.exit_code)
        raise error


def _ranks(environment: Mapping[str, str], program: str) -> tuple[int, int, int] | None:
    """The number of processes that a program has started, and this one's two ranks; None if there are not several."""
    size, rank, local = _LAUNCHERS[program]
    if not environment.get(rank) or _number(environment, size, 1) < 2:
        return None
    return _number(environment, size, 1), _number(environment, rank, 0), _number(environment, local, 0)


def _variables(size: int, rank: int, local_rank: int) -> dict[str, str]:
    return {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(local_rank)}


def _meeting_point(environment: Mapping[str, str]) -> dict[str, str]:
    """The machine of a step's first task, and a port that no other step of a job is likely to have."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    alone = environment.get("SLURM_STEP_NUM_NODES") == "1" or not nodes
    step = f"{environment.get('SLURM_JOB_ID')}.{environment['SLURM_STEP_ID']}"
    port = _PORTS[zlib.crc32(step.encode()) % len(_PORTS)]
    return {"MASTER_ADDR": "127.0.0.1" if alone else first_node(nodes), "MASTER_PORT": str(port)}


def first_node(nodes: str) -> str:
    """Return the first name of a list as SLURM writes it: ``n08`` of ``n[08-11,15],m3``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else nodes)


def _is_task(environment: Mapping[str, str], *, direct: bool) -> bool:
    """Whether this is within one of the tasks of the step that the variables are of.

    It is not in a shell in a terminal (``srun --pty``), of whose tasks only the first one goes on, nor in a job that a
    step has submitted, whose script has the step's variables. What srun starts has no terminal, wherever it is called.

    Args:
        environment: the variables.
        direct: srun has started this very process, or a script has become it: it is no command of a shell.
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
    """A process's parent, and the number of its terminal."""
    _, parent, _, _, terminal, *_ = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return parent, terminal


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name) or str(default)
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"the environment variable {name} is '{value}'; it must be a whole number of at least 0")
    return int(value)
