"""The assignment of micro-batches to processes."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """A micro-batch that a process runs.

    Attributes:
        number: index of the micro-batch within its update, from which its randomness derives.
        own: whether its result counts here. A process that has none left repeats another's, so that all take part in
            the same communication, and adds nothing.
    """

    number: int
    own: bool = True


@dataclass(frozen=True)
class Share:
    """One process's share of an update: micro-batches rank, rank + world_size, ..."""

    rank: int = 0
    world_size: int = 1

    def turns(self, count: int) -> list[Turn]:
        """Return this process's turns of ``count`` micro-batches; every process gets the same number of turns."""
        numbers = range(self.rank, math.ceil(count / self.world_size) * self.world_size, self.world_size)
        return [Turn(number % count, own=number < count) for number in numbers]


#: The share of a single process.
WHOLE = Share()
