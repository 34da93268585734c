"""Cutting an epoch into updates, stored as arrays: an epoch of ten million examples takes 40 MB."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
    """The updates of an epoch; lists are created on access.

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
        first = range(len(self))[index] * self.passes  # IndexError if out of range
        return self.batches.rows(first, first + self.passes)

    def followed_by(self, other: Epoch, most: int) -> Epoch:
        """Return these micro-batches followed by another epoch's, ``most`` in all."""
        ours, theirs = self.batches, other.batches
        bounds = np.concatenate([ours.bounds, ours.bounds[-1] + theirs.bounds[1:]])[: most + 1]
        return Epoch(Ragged(np.concatenate([ours.values, theirs.values])[: bounds[-1]], bounds), self.passes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Epoch) and [*self] == [*other]

    __hash__ = None  # type: ignore[assignment]


def shuffled(random: np.random.Generator, count: int) -> Indices:
    """Return ``0 .. count - 1`` shuffled, in 32 bits if they suffice."""
    order: Indices = np.arange(count, dtype=np.int32 if count <= np.iinfo(np.int32).max else np.int64)
    random.shuffle(order)
    return order


def cut_by_examples(order: Indices, size: int, passes: int, drop_last: bool) -> Epoch:
    """Cut into updates of ``size`` examples, each in even micro-batches.

    A smaller last update has as few micro-batches as possible.

    Args:
        order: shuffled indices of examples.
        size: examples per update.
        passes: micro-batches of a full update.
        drop_last: drop an update of less than ``size``.
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
    """Cut into micro-batches of at most ``budget`` tokens, padded or real, and shuffle the micro-batches.

    Args:
        order: shuffled indices of examples.
        lengths: text tokens and regions of every example.
        budget: tokens of a micro-batch.
        passes: micro-batches per update.
        batch: ``bucket``, ``multiple``, ``drop_last`` and ``sampler``.
        random: shuffles the micro-batches.
    """
    batches = _token_batches(order, lengths, budget, batch)
    drawn = [batches[index] for index in random.permutation(len(batches)).tolist()]
    parts = np.cumsum([0, *map(len, drawn)])
    return Epoch(Ragged(np.concatenate(drawn) if drawn else order[:0], parts), passes)


def _even(count: int, parts: int) -> Indices:
    """Return the ends of ``parts`` even parts of ``count``; the first ones take the remainder."""
    least, more = divmod(count, parts)
    return np.cumsum([least + 1] * more + [least] * (parts - more))


def _token_batches(order: Indices, lengths: Indices, budget: int, batch: BatchConfig) -> list[Indices]:
    batches: list[Indices] = []
    left = order[:0]
    for start in range(0, len(order), batch.bucket):
        items = np.concatenate([left, order[start : start + batch.bucket]])
        items = items[np.argsort(-lengths[items], kind="stable")]
        longest = int(lengths[items[0]])
        while len(items) > (count := _multiple(_fitting(lengths[items], longest, budget, batch), batch.multiple)):
            batches.append(items[:count])
            items = items[count:]
        left = items
        if batch.sampler == "released":  # training drops a bucket's last batch, even a full one
            batches += [] if batch.drop_last else [left]
            left = order[:0]
    return [*batches, left] if len(left) and not batch.drop_last else batches


def _fitting(lengths: Indices, longest: int, budget: int, batch: BatchConfig) -> int:
    """Return how many examples fit into a micro-batch, by their falling lengths and the bucket's longest."""
    if batch.sampler == "real":
        most = budget // max(1, int(lengths[-1])) + 1
        return int(np.searchsorted(lengths[:most].cumsum(), budget, side="right"))
    return budget // (longest if batch.sampler == "released" else int(lengths[0]))


def _multiple(count: int, of: int) -> int:
    """Return the largest multiple of ``of`` up to ``count``, or ``count`` if that is 0."""
    return count // of * of or count


T = TypeVar("T")


def check_counts(config: object, names: Iterable[str]) -> None:
    """Check that options of a data set are at least 1, or None.

    Raises:
        ConfigError: naming the first that is not.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"dataset.{name}={value} is not allowed; give at least 1")


def check_fraction(fraction: float) -> None:
    """Check that a share is in (0, 1].

    Raises:
        ConfigError: the share is out of range.
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"dataset.fraction={fraction} is not allowed; give a share in (0, 1]")


def share(items: Sequence[T], fraction: float, seed: int) -> Sequence[T]:
    """Return a random share of the items, at least one, in order; smaller shares are subsets of larger ones.

    Args:
        items: the items.
        fraction: share in (0, 1].
        seed: seed of the choice.
    """
    return items if fraction == 1 else [items[row] for row in share_rows(len(items), fraction, seed).tolist()]


def share_rows(count: int, fraction: float, seed: int) -> npt.NDArray[np.integer[Any]]:
    """Return the ascending positions of such a share of ``count`` items; see ``share``."""
    if fraction == 1:
        return np.arange(count, dtype=np.int32)
    order = np.random.default_rng(derive_seed("fraction", seed)).permutation(count)
    return np.sort(order[: max(1, round(fraction * count))])
