"""Dealing out micro-batches: which process runs which of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from villa.config.schema import BatchConfig
from villa.errors import ConfigError


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


def batch_of_processes(batch: BatchConfig, world_size: int, *, compares_examples: bool = False) -> BatchConfig:
    """Return how updates are cut for so many processes: where the recipe leaves it open, so that each has a part.

    Args:
        batch: the recipe's ``batch`` section.
        world_size: number of processes.
        compares_examples: whether the loss compares the examples of a micro-batch with each other.

    Raises:
        ConfigError: the number of micro-batches decides about the gradient, and the recipe leaves it open.
    """
    size = batch.examples or batch.tokens
    if world_size == 1 or batch.per_pass is not None or size is None:
        return batch
    reason = None
    if batch.accumulation == "sum":
        reason = "batch.accumulation=sum adds up one mean for each micro-batch, so that their number"
    elif compares_examples:
        reason = "the loss compares the examples of a micro-batch with each other, so that their number"
    if reason is not None:
        raise ConfigError(
            f"{reason} must be told on {world_size} processes: give batch.per_pass, the largest part of an update "
            "that goes through the model at once"
        )
    return replace(batch, per_pass=math.ceil(size / world_size))


def idle_note(batch: BatchConfig, world_size: int) -> list[str]:
    """Say when an update has fewer micro-batches than there are processes."""
    size = batch.examples or batch.tokens or 1
    count = math.ceil(size / min(batch.per_pass or size, size))
    if count >= world_size:
        return []
    return [
        f"an update is {count} micro-batch{'es' * (count > 1)}, so that {world_size - count} of {world_size} processes "
        f"have nothing of their own to do: lower batch.per_pass to {max(1, size // world_size)}"
    ]
