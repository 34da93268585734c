"""Dealing out micro-batches: which process runs which of them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """A micro-batch that a process runs.

    Attributes:
        number: of the micro-batch within its update: what its randomness derives from, whoever runs it.
        own: False where another process answers for it. A process that has none left runs one of the others, so that
            all take part in the same communication, and adds nothing.
    """

    number: int
    own: bool = True


@dataclass(frozen=True)
class Share:
    """What one of ``world_size`` processes runs: of n micro-batches, numbers rank, rank + world_size, ...

    Attributes:
        rank: of the process.
        world_size: number of processes.
    """

    rank: int = 0
    world_size: int = 1

    def turns(self, count: int) -> list[Turn]:
        """Return what this process runs of ``count`` micro-batches; every process has as many turns."""
        numbers = range(self.rank, math.ceil(count / self.world_size) * self.world_size, self.world_size)
        return [Turn(number % count, own=number < count) for number in numbers]


#: Everything, for one process.
WHOLE = Share()
