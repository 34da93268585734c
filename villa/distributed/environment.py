"""Which process this is, as ``torchrun`` and its like say in environment variables. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from villa.errors import ConfigError


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


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name) or str(default)
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"the environment variable {name} is '{value}'; it must be a whole number of at least 0")
    return int(value)
