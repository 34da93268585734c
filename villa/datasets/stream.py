"""Batches from a split: an endless stream of updates for training, and an ordered pass for evaluation."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from villa.batch import Batch
from villa.datasets.base import Example, Split
from villa.datasets.collation import reading
from villa.datasets.ragged import Integers
from villa.datasets.samplers import Position, Sampler
from villa.datasets.workers import TIMEOUT, Board, look_every, out_of_descriptors, watched
from villa.errors import CheckpointError, VillaError
from villa.share import WHOLE, Share, Turn
from villa.signals import shield_worker

Collate = Callable[[Sequence[Example]], Batch]
T = TypeVar("T")

#: Batches of an evaluation whose examples are sorted together; answers wait for those of as many.
_SORTED_TOGETHER = 64
#: Spare file descriptors of a worker, besides those for tensors.
_SPARE = 4


class UpdateStream:
    """Endless iterator over updates, each the list of this process's micro-batches.

    The position is that of the next update to be returned, regardless of prefetching: a stream at a restored position
    continues exactly there, without reading earlier examples.

    Args:
        split: the examples.
        collate: pads examples into a batch.
        sampler: selects the examples of each update.
        workers: number of prefetching processes; 0 reads in this process.
        pin: put batches in page-locked memory (for CUDA).
        share: selects the micro-batches of this process.
        timeout: seconds per example until a warning names it; see ``villa.datasets.workers``.

    Attributes:
        waited: seconds spent waiting for data so far.
        turns: numbers of this process's micro-batches in the last update.
        examples: examples of the last update, over all processes.
        label: the sampler's label of the last update, or None.
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
        """Position of the next update in the sampler's order."""
        return self._position

    def seek(self, position: Position) -> None:
        """Continue from a position of this or an equal stream.

        Raises:
            CheckpointError: the position is malformed.
        """
        if not isinstance(position, Mapping) or not position:
            raise CheckpointError(f"its position in the data is {position!r:.40}")
        self._position = self.sampler.settle(position)
        self.close()

    def close(self) -> None:
        """Stop the workers; the next update restarts them."""
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


def evaluation_plan(
    split: Split, examples: int, *, first: bool = False, by_length: bool = False
) -> list[Sequence[int]]:
    """Return the examples of every batch of an evaluation; it does not depend on the number of processes.

    Args:
        split: the examples.
        examples: largest number of examples of a batch.
        first: return only the first batch, or the first of each part of a mixture.
        by_length: put examples of similar length together, the longest first, so that there is less padding. Each
            example stays within a stretch of 64 batches. Splits that have to be read in order stay as they are.
    """
    parts = split.cut(examples)
    if by_length and not split.sequential:
        lengths = np.asarray(split.lengths)
        parts = [_sorted(part, lengths, examples) for part in parts]
    return [batch for part in parts for batch in part[: 1 if first else None]]


def _sorted(batches: list[Sequence[int]], lengths: Integers, examples: int) -> list[Sequence[int]]:
    """Sort the examples of every stretch of batches by length, and cut it into batches again."""
    found: list[Sequence[int]] = []
    for start in range(0, len(batches), _SORTED_TOGETHER):
        stretch = np.concatenate([np.asarray(batch) for batch in batches[start : start + _SORTED_TOGETHER]])
        order = stretch[np.argsort(-lengths[stretch], kind="stable")].astype(np.int64)
        found += [array("q", order[at : at + examples].tobytes()) for at in range(0, len(order), examples)]
    return found


def evaluation_batches(
    split: Split,
    collate: Collate,
    examples: int,
    workers: int = 0,
    *,
    first: bool = False,
    start: int = 0,
    by_length: bool = False,
    plan: Sequence[Sequence[int]] | None = None,
    share: Share = WHOLE,
    timeout: float = TIMEOUT,
) -> Iterator[Batch | StandIn]:
    """Yield the batches of ``evaluation_plan``, or this process's share of them.

    Args:
        split: the examples.
        collate: pads examples into a batch.
        examples: see ``evaluation_plan``.
        workers: number of prefetching processes.
        first: see ``evaluation_plan``.
        start: number of batches of the plan to leave out.
        by_length: see ``evaluation_plan``.
        plan: that plan, if it is known.
        share: selects the batches of this process; processes that run out get ``StandIn`` batches.
        timeout: as for ``UpdateStream``.
    """
    plan = (plan or evaluation_plan(split, examples, first=first, by_length=by_length))[start:]
    turns = share.turns(len(plan))
    batches: Iterator[list[_Item]] = ([(index, None) for index in plan[turn.number]] for turn in turns)
    batches_loaded = _load(split, collate, batches, workers=workers, pin=False, share=share, timeout=timeout)
    for turn, loaded in zip(turns, batches_loaded, strict=True):
        batch = _raise_if_error(loaded)
        yield batch if turn.own else StandIn(batch)


@dataclass(frozen=True)
class StandIn:
    """Another process's batch, run to keep collective calls aligned and not counted; see ``villa.share``."""

    batch: Batch


def _micro_batches(sampler: Sampler, position: Position, share: Share) -> Iterator[list[_Item]]:
    """Yield micro-batches from a position on, endlessly.

    Not a method of the stream: a reference cycle would leave its workers to the garbage collector, perhaps in a fork.
    """
    while True:
        update = sampler.update(position)
        for turn in share.turns(len(update)):
            yield [(index, sampler.example_seed(position, index)) for index in update[turn.number]]
        position = sampler.after(position)


#: An example's index, and the seed of its random draws (None: no draws).
_Item = tuple[int, int | None]


class _MicroBatches(Dataset[Batch | VillaError]):
    """Maps lists of examples to batches.

    Errors in the user's data are returned as values: raised in a worker, they would arrive as tracebacks.
    """

    def __init__(self, split: Split, collate: Collate, board: Board) -> None:
        self.split, self.collate, self.board = split, collate, board

    def __getitem__(self, items: list[_Item]) -> Batch | VillaError:
        try:
            counts = [self.split.region_counts(index) for index, _ in items]
            with reading(list(chain(*counts)) if all(counts) else ()):
                examples = [self._read(*item) for item in items]
                self.board.begin(items[0][0], len(items) - 1)
                return self._checked_descriptors(self.collate(examples))
        except VillaError as error:
            return error
        except MemoryError:
            return self.board.out_of_memory()
        finally:
            self.board.end()

    def _checked_descriptors(self, batch: Batch) -> Batch | VillaError:
        """Return a batch, or an error if a worker lacks the two file descriptors per tensor to transfer it."""
        if get_worker_info() is None:
            return batch
        tensors: list[torch.Tensor] = []
        batch.map(lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return out_of_descriptors(2 * len(tensors) + _SPARE) or batch

    def _read(self, index: int, seed: int | None) -> Example:
        self.board.begin(index)
        return self.split[index] if seed is None else self.split.draw(index, seed)


class _Plan(Iterable[list[_Item]]):
    """A sampler over an iterator of micro-batches."""

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
    """Start loading micro-batches; see ``UpdateStream`` for the arguments."""
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
        generator=torch.Generator().manual_seed(0),  # keeps the loader off the global generator
    )
    return watched(loader, board)


def _unchanged(value: T) -> T:
    return value


def _raise_if_error(batch: Batch | VillaError) -> Batch:
    if isinstance(batch, VillaError):
        raise batch
    return batch
