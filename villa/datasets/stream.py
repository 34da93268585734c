"""From a split to batches on their way to the model: an endless stream of updates, and evaluation in order."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from villa.batch import Batch
from villa.datasets.base import Example, Split
from villa.datasets.samplers import UpdateSampler
from villa.engine.rng import derive_seed
from villa.errors import VillaError

Collate = Callable[[Sequence[Example]], Batch]
T = TypeVar("T")


class UpdateStream:
    """Endless iterator over updates, each a list of micro-batches.

    Its position is that of the next update to be served, whatever worker processes have prefetched, so a
    stream that is put at a saved position goes on exactly there, without reading what was served before.

    Args:
        split: the examples.
        collate: pads examples into a batch.
        sampler: cuts epochs into updates.
        workers: processes that read ahead; 0 reads in this process.
        pin: put batches in page-locked memory (for CUDA).

    Attributes:
        waited: seconds spent waiting for data so far.
    """

    def __init__(
        self, split: Split, collate: Collate, sampler: UpdateSampler, workers: int = 0, pin: bool = False
    ) -> None:
        self.sampler = sampler
        self.waited = 0.0
        self._batches = _MicroBatches(split, collate)
        self._workers, self._pin = workers, pin
        self._epoch, self._update = 0, 0
        self._loaded: Iterator[Batch | VillaError] | None = None

    @property
    def position(self) -> dict[str, int]:
        """Epoch and update within it (both from 0) of the next update to be served."""
        return {"epoch": self._epoch, "update": self._update}

    def seek(self, position: dict[str, int]) -> None:
        """Go to a position; one past the last update of an epoch is the start of the next epoch."""
        self._epoch, self._update = position["epoch"], position["update"]
        if self._update >= len(self.sampler.epoch(self._epoch)):
            self._epoch, self._update = self._epoch + 1, 0
        self.close()

    def close(self) -> None:
        """Stop the workers; the next update starts them again."""
        self._loaded = None

    def __iter__(self) -> UpdateStream:
        return self

    def __next__(self) -> list[Batch]:
        started = time.perf_counter()
        if self._loaded is None:
            plan = _micro_batches(self.sampler, self._epoch, self._update)
            self._loaded = iter(_loader(self._batches, plan, self._workers, self._pin))
        updates = self.sampler.epoch(self._epoch)
        served = [_raise_if_error(next(self._loaded)) for _ in updates[self._update]]
        self._update += 1
        if self._update == len(updates):
            self._epoch, self._update = self._epoch + 1, 0
        self.waited += time.perf_counter() - started
        return served


def evaluation_batches(split: Split, collate: Collate, examples: int, workers: int = 0) -> Iterator[Batch]:
    """Yield the whole split in order, in ``ceil(len(split) / examples)`` batches of at most ``examples``."""
    items: list[_Item] = [(index, None) for index in range(len(split))]
    batches = (items[start : start + examples] for start in range(0, len(items), examples))
    for batch in _loader(_MicroBatches(split, collate), batches, workers, pin=False):
        yield _raise_if_error(batch)


def _micro_batches(sampler: UpdateSampler, epoch: int, update: int) -> Iterator[list[_Item]]:
    """Yield micro-batches from a position on, for ever.

    No method of the stream: the cycle would leave its workers to the garbage collector, perhaps that of a fork.
    """
    for later in itertools.count(epoch):
        for parts in sampler.epoch(later)[update if later == epoch else 0 :]:
            for part in parts:
                yield [(index, derive_seed("example", sampler.seed, later, index)) for index in part]


#: An example's index, and the seed of its random parts (None: as it is).
_Item = tuple[int, int | None]


class _MicroBatches(Dataset[Batch | VillaError]):
    """Lists of examples to batches.

    An error of the user's data is handed over as a value: raised in a worker, it would arrive as a traceback.
    """

    def __init__(self, split: Split, collate: Collate) -> None:
        self.split, self.collate = split, collate

    def __getitem__(self, items: list[_Item]) -> Batch | VillaError:
        split = self.split
        try:
            return self.collate([split[i] if seed is None else split.draw(i, seed) for i, seed in items])
        except VillaError as error:
            return error


class _Plan(Iterable[list[_Item]]):
    """A sampler that runs once through an iterator of micro-batches."""

    def __init__(self, batches: Iterator[list[_Item]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[_Item]]:
        return self._batches


def _loader(
    batches: _MicroBatches, plan: Iterator[list[_Item]], workers: int, pin: bool
) -> DataLoader[Batch | VillaError]:
    return DataLoader(
        batches,
        batch_size=None,
        sampler=_Plan(plan),
        num_workers=workers,
        pin_memory=pin,
        collate_fn=_unchanged,
        generator=torch.Generator().manual_seed(0),  # else the loader draws from the global one
    )


def _unchanged(value: T) -> T:
    return value


def _raise_if_error(batch: Batch | VillaError) -> Batch:
    if isinstance(batch, VillaError):
        raise batch
    return batch
