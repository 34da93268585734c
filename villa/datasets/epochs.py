"""How an epoch is cut into updates, kept as arrays: an epoch of ten million examples takes 40 MB."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from villa.config.schema import BatchConfig
from villa.datasets.ragged import Ragged
from villa.errors import ConfigError
from villa.rng import derive_seed

Indices = npt.NDArray[np.integer]
#: One update: its micro-batches, each a list of example indices.
Update = list[list[int]]


class Epoch(Sequence[Update]):
    """The updates of an epoch; lists are made of the one that is asked for.

    Args:
        batches: the micro-batches, of indices of examples, in the order in which they are trained on.
        passes: micro-batches of an update; the last update may have fewer.
    """

    def __init__(self, batches: Ragged, passes: int) -> None:
        self.batches, self.passes = batches, passes

    def __len__(self) -> int:
        return math.ceil(len(self.batches) / self.passes)

    @overload
    def __getitem__(self, index: int) -> Update: ...

    @overload
    def __getitem__(self, index: slice) -> list[Update]: ...

    def __getitem__(self, index: int | slice) -> Update | list[Update]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        first = range(len(self))[index] * self.passes  # IndexError where there is none
        return self.batches.rows(first, first + self.passes)

    def followed_by(self, other: Epoch, most: int) -> Epoch:
        """Return these micro-batches and the first of another epoch, ``most`` in all."""
        ours, theirs = self.batches, other.batches
        bounds = np.concatenate([ours.bounds, ours.bounds[-1] + theirs.bounds[1:]])[: most + 1]
        return Epoch(Ragged(np.concatenate([ours.values, theirs.values])[: bounds[-1]], bounds), self.passes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Epoch) and [*self] == [*other]

    __hash__ = None  # type: ignore[assignment]


def shuffled(random: np.random.Generator, count: int) -> Indices:
    """Return ``0 .. count - 1`` shuffled, in 32 bits where they suffice."""
    order: Indices = np.arange(count, dtype=np.int32 if count <= np.iinfo(np.int32).max else np.int64)
    random.shuffle(order)
    return order


def cut_by_examples(order: Indices, size: int, passes: int, drop_last: bool) -> Epoch:
    """Cut into updates of ``size``, each into even micro-batches.

    The last update may be smaller, then with as few micro-batches as it needs.

    Args:
        order: shuffled indices of examples.
        size: examples of an update.
        passes: micro-batches of an update of full size.
        drop_last: leave out an update of less than ``size``.
    """
    whole, rest = divmod(len(order), size)
    ends = size * np.arange(whole)[:, None] + _even(size, passes)
    parts = np.concatenate([[0], ends.ravel()])
    if rest and not drop_last:
        last = _even(rest, math.ceil(rest / math.ceil(size / passes)))
        parts = np.concatenate([parts, whole * size + last])
    return Epoch(Ragged(order[: parts[-1]], parts), passes)


def cut_by_tokens(
    order: Indices, lengths: Indices, budget: int, passes: int, batch: BatchConfig, random: np.random.Generator
) -> Epoch:
    """Cut into micro-batches of at most ``budget`` padded tokens, and shuffle these.

    Args:
        order: shuffled indices of examples.
        lengths: text tokens and regions of every example.
        budget: of a micro-batch.
        passes: micro-batches of an update.
        batch: ``bucket``, ``multiple``, ``drop_last`` and ``sampler``.
        random: shuffles the micro-batches.
    """
    batches = _token_batches(order, lengths, budget, batch)
    drawn = [batches[index] for index in random.permutation(len(batches)).tolist()]
    parts = np.cumsum([0, *map(len, drawn)])
    return Epoch(Ragged(np.concatenate(drawn) if drawn else order[:0], parts), passes)


def _even(count: int, parts: int) -> Indices:
    """Return where ``parts`` even parts of ``count`` end: the first ones have one more where it does not divide."""
    least, more = divmod(count, parts)
    return np.cumsum([least + 1] * more + [least] * (parts - more))


def _token_batches(order: Indices, lengths: Indices, budget: int, batch: BatchConfig) -> list[Indices]:
    batches: list[Indices] = []
    left = order[:0]
    released = batch.sampler == "released"
    for start in range(0, len(order), batch.bucket):
        items = np.concatenate([left, order[start : start + batch.bucket]])
        items = items[np.argsort(-lengths[items], kind="stable")]
        longest = int(lengths[items[0]])
        while len(items) > (count := _multiple(budget // longest, batch.multiple)):
            batches.append(items[:count])
            items = items[count:]
            longest = longest if released else int(lengths[items[0]])
        left = items
        if released:  # every bucket ends with what is left, which training drops even where it is full
            batches += [] if batch.drop_last else [left]
            left = order[:0]
    return [*batches, left] if len(left) and not batch.drop_last else batches


def _multiple(count: int, of: int) -> int:
    """Return the largest multiple that is not above ``count``, or ``count`` itself where that would be 0."""
    return count // of * of or count


T = TypeVar("T")


def check_fraction(fraction: float) -> None:
    """Refuse a share that is none.

    Raises:
        ConfigError: it is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"dataset.fraction={fraction} is not allowed; give a share in (0, 1]")


def share(items: Sequence[T], fraction: float, seed: int) -> Sequence[T]:
    """Return a random share of the items, at least one, in their order; a smaller share is part of a larger one.

    Args:
        items: all of them.
        fraction: the share, in (0, 1].
        seed: of the choice.
    """
    return items if fraction == 1 else [items[row] for row in share_rows(len(items), fraction, seed).tolist()]


def share_rows(count: int, fraction: float, seed: int) -> npt.NDArray[np.integer[Any]]:
    """Return the places of such a share of ``count`` items, ascending; see ``share``."""
    if fraction == 1:
        return np.arange(count, dtype=np.int32)
    order = np.random.default_rng(derive_seed("fraction", seed)).permutation(count)
    return np.sort(order[: max(1, round(fraction * count))])
