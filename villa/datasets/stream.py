"""From a split to batches on their way to the model: an endless stream of updates, and evaluation in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from villa.batch import Batch
from villa.datasets.base import Example, Split
from villa.datasets.samplers import Position, Sampler
from villa.datasets.workers import TIMEOUT, Board, look_every, out_of_descriptors, watched
from villa.errors import CheckpointError, VillaError
from villa.share import WHOLE, Share, Turn
from villa.signals import shield_worker

Collate = Callable[[Sequence[Example]], Batch]
T = TypeVar("T")

#: Files that a worker opens besides those of tensors.
_SPARE = 4


class UpdateStream:
    """Endless iterator over updates, each a list of micro-batches: those of one process.

    Its position is that of the next update to be served, whatever worker processes have prefetched, so a
    stream that is put at a saved position goes on exactly there, without reading what was served before.

    Args:
        split: the examples.
        collate: pads examples into a batch.
        sampler: says which examples make an update.
        workers: processes that read ahead; 0 reads in this process.
        pin: put batches in page-locked memory (for CUDA).
        share: the micro-batches of this process; the others are not read.
        timeout: seconds that an example may take before it is named in a warning; see ``villa.datasets.workers``.

    Attributes:
        waited: seconds spent waiting for data so far.
        turns: which micro-batches of the update served last this process has been given.
        examples: examples of that update, over all processes.
        label: what the sampler calls the update that was served last, or None.
    """

    def __init__(
        self,
        split: Split,
        collate: Collate,
        sampler: Sampler,
        workers: int = 0,
        pin: bool = False,
        share: Share = WHOLE,
        timeout: float = TIMEOUT,
    ) -> None:
        self.sampler, self.share = sampler, share
        self.waited = 0.0
        self.turns: list[Turn] = []
        self.examples = 0
        self.label: str | None = None
        self._load = partial(_load, split, collate, workers=workers, pin=pin, share=share, timeout=timeout)
        self._position = sampler.start()
        self._loaded: Iterator[Batch | VillaError] | None = None

    @property
    def position(self) -> Position:
        """Where the sampler is at the next update to be served."""
        return self._position

    def seek(self, position: Position) -> None:
        """Go to a position that this or an equal stream had.

        Raises:
            CheckpointError: it is none.
        """
        if not isinstance(position, Mapping) or not position:
            raise CheckpointError(f"its position in the data is {position!r:.40}")
        self._position = self.sampler.settle(position)
        self.close()

    def close(self) -> None:
        """Stop the workers; the next update starts them again."""
        self._loaded = None

    def __iter__(self) -> UpdateStream:
        return self

    def __next__(self) -> list[Batch]:
        started = time.perf_counter()
        if self._loaded is None:
            self._loaded = self._load(_micro_batches(self.sampler, self._position, self.share))
        update = self.sampler.update(self._position)
        self.turns, self.examples = self.share.turns(len(update)), sum(map(len, update))
        served = [_raise_if_error(next(self._loaded)) for _ in self.turns]
        self.label = self.sampler.label(self._position)
        self._position = self.sampler.after(self._position)
        self.waited += time.perf_counter() - started
        return served


def evaluation_batches(
    split: Split,
    collate: Collate,
    examples: int,
    workers: int = 0,
    *,
    first: bool = False,
    share: Share = WHOLE,
    timeout: float = TIMEOUT,
) -> Iterator[Batch | StandIn]:
    """Yield a split in order, in batches of at most ``examples``: every one, or every one of a process's share.

    Args:
        split: the examples.
        collate: pads examples into a batch.
        examples: largest number of examples of a batch.
        workers: processes that read ahead.
        first: yield only the first batch, or the first one of every part.
        share: the batches of this process; with several processes all get as many, some of them as ``StandIn``.
        timeout: as for ``UpdateStream``.
    """
    plan = [batch for part in split.cut(examples) for batch in part[: 1 if first else None]]
    turns = share.turns(len(plan))
    batches: Iterator[list[_Item]] = ([(index, None) for index in plan[turn.number]] for turn in turns)
    batches_loaded = _load(split, collate, batches, workers=workers, pin=False, share=share, timeout=timeout)
    for turn, loaded in zip(turns, batches_loaded, strict=True):
        batch = _raise_if_error(loaded)
        yield batch if turn.own else StandIn(batch)


@dataclass(frozen=True)
class StandIn:
    """A batch that another process answers for, run by one that has none left: see ``villa.share``."""

    batch: Batch


def _micro_batches(sampler: Sampler, position: Position, share: Share) -> Iterator[list[_Item]]:
    """Yield micro-batches from a position on, for ever.

    No method of the stream: the cycle would leave its workers to the garbage collector, perhaps that of a fork.
    """
    while True:
        update = sampler.update(position)
        for turn in share.turns(len(update)):
            yield [(index, sampler.example_seed(position, index)) for index in update[turn.number]]
        position = sampler.after(position)


#: An example's index, and the seed of its random parts (None: as it is).
_Item = tuple[int, int | None]


class _MicroBatches(Dataset[Batch | VillaError]):
    """Lists of examples to batches.

    An error of the user's data is handed over as a value: raised in a worker, it would arrive as a traceback.
    """

    def __init__(self, split: Split, collate: Collate, board: Board) -> None:
        self.split, self.collate, self.board = split, collate, board

    def __getitem__(self, items: list[_Item]) -> Batch | VillaError:
        try:
            examples = [self._read(*item) for item in items]
            self.board.begin(items[0][0], len(items) - 1)
            return self._handed_over(self.collate(examples))
        except VillaError as error:
            return error
        except MemoryError:
            return self.board.out_of_memory()
        finally:
            self.board.end()

    def _handed_over(self, batch: Batch) -> Batch | VillaError:
        """Return what a worker hands over: every tensor takes it two open files, and failing then is not told."""
        if get_worker_info() is None:
            return batch
        tensors: list[torch.Tensor] = []
        batch.map(lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return out_of_descriptors(2 * len(tensors) + _SPARE) or batch

    def _read(self, index: int, seed: int | None) -> Example:
        self.board.begin(index)
        return self.split[index] if seed is None else self.split.draw(index, seed)


class _Plan(Iterable[list[_Item]]):
    """A sampler that runs once through an iterator of micro-batches."""

    def __init__(self, batches: Iterator[list[_Item]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[_Item]]:
        return self._batches


def _load(
    split: Split,
    collate: Collate,
    plan: Iterator[list[_Item]],
    *,
    workers: int,
    pin: bool,
    share: Share,
    timeout: float,
) -> Iterator[Batch | VillaError]:
    """Start to load micro-batches; see ``UpdateStream`` for the arguments."""
    board = Board(workers, split.describe, timeout, share)
    loader = DataLoader(
        _MicroBatches(split, collate, board),
        batch_size=None,
        sampler=_Plan(plan),
        num_workers=workers,
        pin_memory=pin,
        collate_fn=_unchanged,
        timeout=look_every(board),
        worker_init_fn=shield_worker,
        generator=torch.Generator().manual_seed(0),  # else the loader draws from the global one
    )
    return watched(loader, board)


def _unchanged(value: T) -> T:
    return value


def _raise_if_error(batch: Batch | VillaError) -> Batch:
    if isinstance(batch, VillaError):
        raise batch
    return batch
