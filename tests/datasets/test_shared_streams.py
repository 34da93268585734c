"""Ranks share the updates of one process: a micro-batch goes to one rank, whole, and no rank reads other examples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from villa.config.schema import BatchConfig
from villa.datasets.base import Example, Split
from villa.datasets.collation import collate
from villa.datasets.stream import StandIn, UpdateStream, evaluation_batches
from villa.datasets.uniter.pretraining_splits import Mixture, MixturePart
from villa.share import Share

UPDATES = 30
WORLD_SIZES = (1, 2, 3, 4, 8)


class Drawn(Split):
    """Examples of different lengths, called by their index and the seed of their random parts; notes what is read."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.read = name, list[str]()
        self._lengths = np.random.default_rng(count).integers(3, 30, count)

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> Example:
        return self.draw(index, 0)

    def draw(self, index: int, seed: int) -> Example:
        id = f"{self.name}{index}:{seed}"
        self.read.append(id)
        return Example(id, torch.zeros(int(self._lengths[index]), dtype=torch.int64))

    @property
    def lengths(self) -> Sequence[int]:
        return self._lengths.tolist()


def one() -> tuple[Split, list[Drawn]]:
    split = Drawn("a", 150)
    return split, [split]


def mixed() -> tuple[Split, list[Drawn]]:
    parts = [Drawn("a", 90), Drawn("b", 40), Drawn("c", 25)]
    weighted = zip(parts, (2.0, 1.0, 0.5), strict=True)
    return Mixture([MixturePart(part.name, part.name, weight, part) for part, weight in weighted]), parts


#: What a rank is given: the number of the update and of the micro-batch in it, whether it is its own, the ids.
Given = tuple[int, int, bool, tuple[str, ...]]


def given(make: Callable[[], tuple[Split, list[Drawn]]], batch: BatchConfig, share: Share) -> list[Given]:
    """What a rank is given in some epochs; it reads that, once, and nothing else."""
    split, parts = make()
    stream = UpdateStream(split, collate, split.sampler(batch, seed=5), share=share)
    found: list[Given] = []
    for update, micro_batches in enumerate(itertools.islice(stream, UPDATES)):
        for turn, micro_batch in zip(stream.turns, micro_batches, strict=True):
            found.append((update, turn.number, turn.own, tuple(micro_batch.ids)))
    served = sorted(id for *_, ids in found for id in ids)
    assert sorted(id for part in parts for id in part.read) == served
    return found


BATCHES = {
    "tokens": BatchConfig(tokens=400, per_pass=100, bucket=32),
    "tokens, multiples": BatchConfig(tokens=400, per_pass=80, bucket=64, multiple=4),
    "tokens, whole batches": BatchConfig(tokens=300, per_pass=60, bucket=16, drop_last=True),
    "tokens, one pass": BatchConfig(tokens=120),
    "examples": BatchConfig(examples=14, per_pass=3),
    "examples, whole batches": BatchConfig(examples=12, per_pass=5, drop_last=True),
}


@pytest.mark.parametrize("make", [one, mixed])
@pytest.mark.parametrize("name", BATCHES)
def test_all_ranks_together_have_the_updates_of_one_process(
    name: str, make: Callable[[], tuple[Split, list[Drawn]]]
) -> None:
    alone = given(make, BATCHES[name], Share())
    assert all(own for _, _, own, _ in alone)
    whole = {(update, number): ids for update, number, _, ids in alone}
    assert len(whole) == len(alone) > UPDATES / 2
    if name == "tokens":  # else nothing is shown
        assert max(number for _, number in whole) >= 3
    for world_size in WORLD_SIZES[1:]:
        ranks = [given(make, BATCHES[name], Share(rank, world_size)) for rank in range(world_size)]
        own = sorted(entry for rank in ranks for entry in rank if entry[2])
        assert own == sorted(alone)  # each once
        for rank in ranks:
            assert [entry[:1] for entry in rank] == [entry[:1] for entry in ranks[0]]  # as many turns an update
            assert all(ids == whole[update, number] for update, number, _, ids in rank)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_in_evaluation_too_a_rank_reads_its_own_batches_and_those_that_it_stands_in_for(world_size: int) -> None:
    expected = [tuple(batch.ids) for batch in evaluation_batches(Drawn("a", 50), collate, 8)]  # type: ignore[union-attr]
    found: dict[int, tuple[str, ...]] = {}
    for rank in range(world_size):
        split, share = Drawn("a", 50), Share(rank, world_size)
        batches = list(evaluation_batches(split, collate, 8, share=share))
        own = [tuple(batch.ids) for batch in batches if not isinstance(batch, StandIn)]
        found |= dict(zip(range(rank, len(expected), world_size), own, strict=True))
        read = [id for batch in batches for id in (batch.batch if isinstance(batch, StandIn) else batch).ids]
        assert split.read == read
        assert len(batches) - len(own) <= 1
    assert [found[number] for number in sorted(found)] == expected
