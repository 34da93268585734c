"""Which examples make an update, and how an update is cut into micro-batches.

The plan depends on the data, the options, the seed and the epoch alone, never on the number of processes.
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

#: A number for every example: a list, an array or something that reads like one.
Lengths = Sequence[int] | npt.NDArray[np.integer]
#: Which update is the next one, as JSON values: it is saved in checkpoints.
Position = Mapping[str, Any]

_RESUME = "resume with the recipe that it was trained with, or start another run with model.checkpoint"


class Sampler(ABC):
    """An endless sequence of updates, in which every position leads to the same updates."""

    def start(self) -> Position:
        """Return the position of the first update."""
        return self.settle({})

    @abstractmethod
    def settle(self, saved: Position) -> Position:
        """Return the position that a saved one means now; an empty one is the start.

        Raises:
            CheckpointError: it is one of another kind of sampler.
        """

    @abstractmethod
    def update(self, position: Position) -> Update:
        """Return the update at a position."""

    @abstractmethod
    def after(self, position: Position) -> Position:
        """Return the next position."""

    @abstractmethod
    def example_seed(self, position: Position, index: int) -> int:
        """Return what the random parts of an example derive from at a position."""

    @abstractmethod
    def label(self, position: Position) -> str | None:
        """Return what the update at a position is logged under besides, or None."""

    @abstractmethod
    def total_updates(self, epochs: int) -> int:
        """Return the number of updates of the first ``epochs`` epochs."""

    @abstractmethod
    def describe(self) -> str:
        """One line for the log."""

    @abstractmethod
    def warnings(self) -> list[str]:
        """What an update cannot be as the recipe asks, and what an epoch leaves out, one line each."""


class UpdateSampler(Sampler):
    """Cuts every epoch into updates made of micro-batches.

    By examples: the shuffled epoch is cut into updates of ``examples``, each into even micro-batches of at most
    ``per_pass``. By tokens: the shuffled epoch is cut into buckets sorted by length, and micro-batches are filled while
    longest x count stays within the budget; what a bucket leaves over joins the next bucket, so nothing is
    dropped unless ``drop_last`` asks for it. ``batch.sampler=released`` cuts buckets as the released
    ``TokenBucketSampler`` does instead.

    Args:
        lengths: text tokens plus regions of every example; only its length matters when cutting by examples.
        batch: the size of an update.
        seed: of the shuffling.

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
        # Two epochs: the one that is trained on and the one that is prefetched.
        self._cached = lru_cache(maxsize=2)(self._cut)

    def epoch(self, epoch: int) -> Epoch:
        """Return the updates of an epoch (counted from 0); no example is in two micro-batches of an epoch."""
        return self._cached(epoch)

    def settle(self, saved: Position) -> Position:
        """See the base class; one past the last update of an epoch is the start of the next epoch."""
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
        """See the base class."""
        return self.epoch(position["epoch"])[position["update"]]

    def after(self, position: Position) -> Position:
        """See the base class."""
        return self.settle({"epoch": position["epoch"], "update": position["update"] + 1})

    def example_seed(self, position: Position, index: int) -> int:
        """See the base class; every epoch draws anew."""
        return derive_seed("example", self.seed, position["epoch"], index)

    def label(self, position: Position) -> str | None:
        """None: all updates are of one kind."""
        return None

    def total_updates(self, epochs: int) -> int:
        """Updates of the first ``epochs`` epochs."""
        if self._lengths is None:  # all epochs are alike
            return epochs * len(self.epoch(0))
        return sum(len(self.epoch(epoch)) for epoch in range(epochs))

    def describe(self) -> str:
        """One line for the log: ``64 examples an update = 16 x 4 passes``."""
        unit = "examples" if self._lengths is None else "tokens"
        most = "" if self._lengths is None and self.size % self.passes == 0 else "at most "
        passes = "pass" if self.passes == 1 else "passes"
        return f"{self.size} {unit} an update = {most}{self.per_pass} x {self.passes} {passes}"

    def warnings(self) -> list[str]:
        """What an update cannot be as the recipe asks, and what an epoch leaves out, one line each."""
        found = []
        unit, available = "examples", self.count
        if self._lengths is not None:
            unit, available = "tokens", int(self._lengths.sum())
        if available < self.size:
            found.append(
                f"batch.{unit}={self.size} is not reachable: the whole training split has {available} {unit}, "
                "so an update is one epoch"
            )
        if self.batch.drop_last and (left := self.count - len(self.epoch(0).order)):
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
        # The released loop of pre-training goes on into the next epoch where an update is longer than one.
        while self.batch.sampler == "released" and len(cut.parts) - 1 < self.passes:
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
    """What a part of mixed data needs to be sampled.

    Attributes:
        name: unique among the parts.
        label: what its updates are logged under.
        weight: how often it is drawn, relative to the others.
        lengths: text tokens plus regions of its examples.
    """

    name: str
    label: str
    weight: float
    lengths: Lengths


class MixedSampler(Sampler):
    """Draws for every update one of several parts, whose own sampler goes on where the part was left.

    The draw of update ``n`` derives from the seed and ``n`` alone; the position says besides where each part is.
    Indices of examples count through all parts.

    Args:
        shares: the parts in order.
        batch: the size of an update.
        seed: of the draws and of the shuffling.

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
        """Return the part that update number ``update`` (from 0) is of."""
        return self._cached(update)

    def _draw(self, update: int) -> MixtureShare:
        draws = random.Random(derive_seed("mixture", self.seed, update))  # noqa: S311 - no secret
        (share,) = draws.choices(self.shares, [share.weight for share in self.shares])
        return share

    def settle(self, saved: Position) -> Position:
        """See the base class; parts that are new start at their beginning."""
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
        """See the base class."""
        name, sampler, within = self._drawn(position)
        start = self._starts[name]
        return [[start + index for index in part] for part in sampler.update(within)]

    def after(self, position: Position) -> Position:
        """See the base class."""
        name, sampler, within = self._drawn(position)
        return {"update": position["update"] + 1, "parts": {**position["parts"], name: sampler.after(within)}}

    def example_seed(self, position: Position, index: int) -> int:
        """See the base class; the parts draw apart from each other."""
        name, sampler, within = self._drawn(position)
        return sampler.example_seed(within, index - self._starts[name])

    def label(self, position: Position) -> str | None:
        """The label of the part that is drawn."""
        return self.draw(position["update"]).label

    def total_updates(self, epochs: int) -> int:
        """Refuse: parts have epochs of their own.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"training.epochs={epochs}: each part of a mixture has epochs of its own; give training.updates"
        )

    def describe(self) -> str:
        """The size of an update, and how likely each label is."""
        total = sum(share.weight for share in self.shares)
        likely: dict[str, float] = {}
        for share in self.shares:
            likely[share.label] = likely.get(share.label, 0) + share.weight / total
        mix = ", ".join(f"{label} {100 * part:.3g} %" for label, part in likely.items())
        return f"{next(iter(self.samplers.values())).describe()} (of one of {mix})"

    def warnings(self) -> list[str]:
        """Those of every part, each once."""
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
