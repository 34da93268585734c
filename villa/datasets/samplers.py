"""Samplers: composition of updates from examples, and their division into micro-batches.

Both depend only on the data, the options, the seed and the epoch, never on the number of processes.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from villa.config.schema import BatchConfig
from villa.datasets.epochs import Epoch, Update, cut_by_examples, cut_by_tokens, shuffled
from villa.errors import CheckpointError, ConfigError, DataError, about
from villa.json_values import is_count
from villa.rng import derive_seed

#: Length of every example, as a list, an array or another sequence.
Lengths = Sequence[int] | npt.NDArray[np.integer]
#: Position of an update in the sequence, as JSON values; checkpoints store it.
Position = Mapping[str, Any]

_RESUME = "resume with the recipe that it was trained with, or start another run with model.checkpoint"


class Sampler(ABC):
    """An endless, deterministic sequence of updates."""

    def start(self) -> Position:
        """Return the position of the first update."""
        return self.settle({})

    @abstractmethod
    def settle(self, saved: Position) -> Position:
        """Return the current equivalent of a saved position; an empty one means the start.

        Raises:
            CheckpointError: it belongs to another kind of sampler.
        """

    @abstractmethod
    def update(self, position: Position) -> Update:
        """Return the update at a position."""

    @abstractmethod
    def after(self, position: Position) -> Position:
        """Return the next position."""

    @abstractmethod
    def example_seed(self, position: Position, index: int) -> int:
        """Return the seed of an example's random parts at a position."""

    @abstractmethod
    def label(self, position: Position) -> str | None:
        """Return a further name under which the update at a position is logged, or None."""

    @abstractmethod
    def total_updates(self, epochs: int) -> int:
        """Return the number of updates of the first ``epochs`` epochs."""

    @abstractmethod
    def describe(self) -> str:
        """Return one line for the log."""

    @abstractmethod
    def warnings(self) -> list[str]:
        """Return how updates deviate from the recipe, and what an epoch leaves out, one line each."""


class UpdateSampler(Sampler):
    """Cuts every shuffled epoch into updates made of micro-batches.

    By examples: into updates of ``examples``, each split into even micro-batches of at most ``per_pass``. By tokens:
    into buckets sorted by length, from which micro-batches are filled while longest x count stays within the budget;
    the rest of a bucket joins the next one, so that nothing is dropped without ``drop_last``.
    ``batch.sampler=released`` cuts buckets like the released ``TokenBucketSampler``, ``real`` counts no padding.

    Args:
        lengths: tokens plus regions of every example; only their number matters when cutting by examples.
        batch: the size of an update.
        seed: seed of the shuffling.

    Raises:
        ConfigError: ``batch`` gives both or neither of ``examples`` and ``tokens``, or a number below 1.
        DataError: there is no example, one is longer than the budget, or ``drop_last`` leaves nothing.
    """

    def __init__(self, lengths: Lengths, batch: BatchConfig, seed: int) -> None:
        self.size, self.passes, self.per_pass = _plan(batch)
        self.batch = batch
        self.seed = seed
        self.count = len(lengths)
        if not self.count:
            raise DataError("there is no example to sample from; check the training split and its limit")
        self._lengths = np.asarray(lengths, dtype=np.int32) if batch.tokens else None
        if self._lengths is not None and self._lengths.max() > self.per_pass:
            worst = int(self._lengths.argmax())
            raise DataError(
                f"example {worst} has {self._lengths[worst]} tokens and regions, more than a pass of {self.per_pass}; "
                "raise batch.tokens or batch.per_pass, or lower dataset.max_text_length"
            )
        # Two epochs: the current one and the one that is prefetched.
        self._cached = lru_cache(maxsize=2)(self._cut)

    def epoch(self, epoch: int) -> Epoch:
        """Return the updates of an epoch (counted from 0), in which every example occurs at most once."""
        return self._cached(epoch)

    def settle(self, saved: Position) -> Position:
        """Return the current equivalent of a saved position; the end of an epoch is the start of the next."""
        if "parts" in saved:
            raise CheckpointError(
                "it was trained on a mixture (dataset.mix, dataset.corpora), and the data of this recipe is none; "
                f"{_RESUME}"
            )
        epoch, update = (_count(saved, "epoch"), _count(saved, "update")) if saved else (0, 0)
        if update and update >= len(self.epoch(epoch)):
            epoch, update = epoch + 1, 0
        return {"epoch": epoch, "update": update}

    def update(self, position: Position) -> Update:
        """Return the update at a position."""
        return self.epoch(position["epoch"])[position["update"]]

    def after(self, position: Position) -> Position:
        """Return the next position."""
        return self.settle({"epoch": position["epoch"], "update": position["update"] + 1})

    def example_seed(self, position: Position, index: int) -> int:
        """Return the seed of an example, another one in every epoch."""
        return derive_seed("example", self.seed, position["epoch"], index)

    def label(self, position: Position) -> str | None:
        """Return None: all updates are of one kind."""
        return None

    def total_updates(self, epochs: int) -> int:
        """Return the number of updates of the first ``epochs`` epochs."""
        if self._lengths is None:  # all epochs have the same size
            return epochs * len(self.epoch(0))
        return sum(len(self.epoch(epoch)) for epoch in range(epochs))

    def describe(self) -> str:
        """Return one line for the log: ``64 examples an update = 16 x 4 passes``."""
        unit = "examples" if self._lengths is None else "tokens"
        most = "" if self._lengths is None and self.size % self.passes == 0 else "at most "
        passes = "pass" if self.passes == 1 else "passes"
        return f"{self.size} {unit} an update = {most}{self.per_pass} x {self.passes} {passes}"

    def warnings(self) -> list[str]:
        """Return how updates deviate from the recipe, and what an epoch leaves out, one line each."""
        found = []
        unit, available = "examples", self.count
        if self._lengths is not None:
            unit, available = "tokens", int(self._lengths.sum())
        if available < self.size:
            found.append(
                f"batch.{unit}={self.size} is not reachable: the whole training split has {available} {unit}, "
                "so an update is one epoch"
            )
        if self.batch.drop_last and (left := self.count - len(self.epoch(0).batches.values)):
            found.append(f"batch.drop_last leaves out {left:,} of {self.count:,} examples in every epoch")
        asked = self.batch.per_pass
        if asked is not None and asked < self.size and asked != self.per_pass:
            found.append(
                f"batch.per_pass={asked} does not divide batch.{unit}={self.size}: a pass has at most {self.per_pass} "
                f"{unit}, so that {self.passes} passes make an update"
            )
        return found

    def _cut(self, epoch: int) -> Epoch:
        random = np.random.default_rng(derive_seed("updates", self.seed, epoch))
        cut = self._cut_once(random)
        # As in the released pre-training loop, an update that is longer than an epoch continues into the next.
        while self.batch.sampler == "released" and len(cut.batches) < self.passes:
            cut = cut.followed_by(self._cut_once(random), self.passes)
        return cut

    def _cut_once(self, random: np.random.Generator) -> Epoch:
        order = shuffled(random, self.count)
        if self._lengths is None:
            cut = cut_by_examples(order, self.size, self.passes, self.batch.drop_last)
        else:
            cut = cut_by_tokens(order, self._lengths, self.per_pass, self.passes, self.batch, random)
        if not cut:
            raise DataError(
                f"batch.drop_last leaves nothing of {self.count} training examples: set it to false or lower the batch"
            )
        return cut


@dataclass(frozen=True)
class MixtureShare:
    """One part of a mixture.

    Attributes:
        name: unique among the parts.
        label: name under which its updates are logged.
        weight: relative frequency of its updates.
        lengths: tokens plus regions of its examples.
    """

    name: str
    label: str
    weight: float
    lengths: Lengths


class MixedSampler(Sampler):
    """Draws one of several parts for every update; each part has its own sampler and position.

    The draw of update ``n`` derives from the seed and ``n`` alone. Example indices run through all parts.

    Args:
        shares: the parts in order.
        batch: the size of an update.
        seed: seed of the draws and the shuffling.

    Raises:
        ConfigError: as for ``UpdateSampler``.
        DataError: as for ``UpdateSampler``, naming the part.
    """

    def __init__(self, shares: Sequence[MixtureShare], batch: BatchConfig, seed: int) -> None:
        self.seed, self.shares = seed, list(shares)
        self.samplers: dict[str, UpdateSampler] = {}
        for share in self.shares:
            with about(share.name):
                own = derive_seed("part", seed, share.name)
                self.samplers[share.name] = UpdateSampler(share.lengths, batch, own)
        ends = accumulate(len(share.lengths) for share in self.shares)
        self._starts = dict(zip(self.samplers, (0, *ends), strict=False))
        self._cached = lru_cache(maxsize=16)(self._draw)

    def draw(self, update: int) -> MixtureShare:
        """Return the part of update number ``update`` (from 0)."""
        return self._cached(update)

    def _draw(self, update: int) -> MixtureShare:
        draws = random.Random(derive_seed("mixture", self.seed, update))  # noqa: S311 - no secret
        (share,) = draws.choices(self.shares, [share.weight for share in self.shares])
        return share

    def settle(self, saved: Position) -> Position:
        """Return the current equivalent of a saved position; new parts start at their beginning."""
        if saved and "parts" not in saved:
            raise CheckpointError(
                "it does not say where the parts of a mixture (dataset.mix, dataset.corpora) are, because it was not "
                f"trained on one; {_RESUME}"
            )
        update, parts = (_count(saved, "update"), saved["parts"]) if saved else (0, {})
        return {
            "update": update,
            "parts": {name: sampler.settle(parts.get(name, {})) for name, sampler in self.samplers.items()},
        }

    def update(self, position: Position) -> Update:
        """Return the update at a position."""
        name, sampler, within = self._drawn(position)
        start = self._starts[name]
        return [[start + index for index in part] for part in sampler.update(within)]

    def after(self, position: Position) -> Position:
        """Return the next position."""
        name, sampler, within = self._drawn(position)
        return {"update": position["update"] + 1, "parts": {**position["parts"], name: sampler.after(within)}}

    def example_seed(self, position: Position, index: int) -> int:
        """Return the seed of an example, which also depends on its part."""
        name, sampler, within = self._drawn(position)
        return sampler.example_seed(within, index - self._starts[name])

    def label(self, position: Position) -> str | None:
        """Return the label of the drawn part."""
        return self.draw(position["update"]).label

    def total_updates(self, epochs: int) -> int:
        """Refuse, as each part has its own epochs.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"training.epochs={epochs}: each part of a mixture has epochs of its own; give training.updates"
        )

    def describe(self) -> str:
        """Return the size of an update and the probability of each label."""
        total = sum(share.weight for share in self.shares)
        likely: dict[str, float] = {}
        for share in self.shares:
            likely[share.label] = likely.get(share.label, 0) + share.weight / total
        mix = ", ".join(f"{label} {100 * part:.3g} %" for label, part in likely.items())
        return f"{next(iter(self.samplers.values())).describe()} (of one of {mix})"

    def warnings(self) -> list[str]:
        """Return the distinct warnings of all parts."""
        found = {line: name for name, sampler in self.samplers.items() for line in sampler.warnings()}
        return [f"{name}: {line}" for line, name in found.items()]

    def _drawn(self, position: Position) -> tuple[str, UpdateSampler, Position]:
        name = self.draw(position["update"]).name
        return name, self.samplers[name], position["parts"][name]


def _count(saved: Position, name: str) -> int:
    value = saved[name]
    if is_count(value):
        return value
    raise CheckpointError(f"its position in the data has '{name}' {value!r:.40}, where a count should be")


def _plan(batch: BatchConfig) -> tuple[int, int, int]:
    """Return the size of an update, its number of passes, and the largest size of a pass."""
    if (batch.examples is None) == (batch.tokens is None):
        raise ConfigError("batch: give either 'examples' or 'tokens' (the size of an update), and not both")
    for name in ("examples", "tokens", "per_pass", "bucket"):
        value = getattr(batch, name)
        if value is not None and value < 1:
            raise ConfigError(f"batch.{name}={value} is not allowed; give a number of at least 1")
    size = batch.examples or batch.tokens or 0
    passes = math.ceil(size / min(batch.per_pass or size, size))
    return size, passes, size // passes if batch.tokens else math.ceil(size / passes)
