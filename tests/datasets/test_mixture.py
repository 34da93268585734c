"""Mixtures: which part an update is of, where every part goes on, and what shares a batch."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from villa.batch import Batch
from villa.config.schema import BatchConfig
from villa.datasets.base import Example, Split
from villa.datasets.collation import collate
from villa.datasets.samplers import MixedSampler, MixtureShare, Sampler, UpdateSampler
from villa.datasets.stream import UpdateStream, evaluation_batches
from villa.datasets.uniter.pretraining_splits import Mixture, MixturePart
from villa.errors import CheckpointError, ConfigError, DataError
from villa.rng import derive_seed

BATCH = BatchConfig(examples=4, per_pass=2)
SHARES = [
    MixtureShare("a", "first", 2, [1] * 10),
    MixtureShare("b", "second", 1, [1] * 7),
    MixtureShare("c", "first", 1, [1] * 5),
]

LONGER = [replace(share, lengths=[1] * 30) for share in SHARES]


class Named(Split):
    """Examples called by their split's name and their index; drawn ones show their seed."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        return Example(f"{self.name}{index}", torch.tensor([1]), target=0)

    def draw(self, index: int, seed: int) -> Example:
        return Example(f"{self.name}{index}:{seed}", torch.tensor([1]))

    @property
    def lengths(self) -> Sequence[int]:
        return [1] * self.count


def mixture() -> Mixture:
    return Mixture([MixturePart(s.name, s.label, s.weight, Named(s.name, len(s.lengths))) for s in SHARES])


def stream(workers: int = 0) -> UpdateStream:
    split = mixture()
    return UpdateStream(split, collate, split.sampler(BATCH, seed=3), workers=workers)


def ids(update: list[Batch]) -> list[list[str]]:
    return [batch.ids for batch in update]


def walk(sampler: Sampler, updates: int) -> list[list[list[int]]]:
    position, found = sampler.start(), []
    for _ in range(updates):
        found.append(sampler.update(position))
        position = sampler.after(position)
    return found


def test_the_part_of_an_update_derives_from_the_seed_and_its_number_alone() -> None:
    one, two = (MixedSampler(shares, BATCH, 5) for shares in (SHARES, LONGER))
    drawn = [one.draw(update).name for update in range(50)]
    assert drawn == [two.draw(update).name for update in range(50)]
    assert drawn != [MixedSampler(SHARES, BATCH, 6).draw(update).name for update in range(50)]


def test_parts_are_drawn_by_their_weights() -> None:
    sampler = MixedSampler(SHARES, BATCH, 0)
    count = Counter(sampler.draw(update).name for update in range(4000))
    for share in SHARES:
        assert count[share.name] / 4000 == pytest.approx(share.weight / 4, abs=0.03)  # 4 standard deviations


def test_a_part_of_weight_0_is_never_drawn() -> None:
    sampler = MixedSampler([SHARES[0], MixtureShare("none", "x", 0, [1])], BATCH, 0)
    assert {sampler.draw(update).name for update in range(500)} == {"a"}


def test_every_part_goes_through_its_epochs_by_a_sampler_of_its_own() -> None:
    sampler = MixedSampler(SHARES, BATCH, 5)
    updates = walk(sampler, 60)
    starts = {"a": 0, "b": 10, "c": 17}
    for share in SHARES:
        own = UpdateSampler(share.lengths, BATCH, derive_seed("part", 5, share.name))
        mine = [update for n, update in enumerate(updates) if sampler.draw(n).name == share.name]
        expected = [
            [[starts[share.name] + i for i in part] for part in update]
            for epoch in range(40)
            for update in own.epoch(epoch)
        ]
        assert mine == expected[: len(mine)]
        assert len(mine) > 5


def test_an_update_is_of_one_part_in_all_its_micro_batches() -> None:
    updates = stream()
    for _ in range(30):
        (found,) = {name[0] for part in ids(next(updates)) for name in part}
        assert updates.label == {"a": "first", "b": "second", "c": "first"}[found]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("served", [0, 1, 7, 20])
def test_a_position_leads_to_the_same_updates_and_draws(served: int, workers: int) -> None:
    first = stream()
    for _ in range(served):
        next(first)
    second = stream(workers)
    next(second)
    second.seek(first.position)
    assert second.position == first.position
    assert [ids(next(second)) for _ in range(6)] == [ids(next(first)) for _ in range(6)]
    second.close()


def test_the_position_says_where_every_part_is_and_new_parts_start_at_their_beginning() -> None:
    updates = stream()
    for _ in range(12):
        next(updates)
    position = updates.position
    assert position["update"] == 12
    assert position["parts"].keys() == {"a", "b", "c"}
    done = sum(
        part["update"] + part["epoch"] * len(s.lengths[::4])
        for part, s in zip(position["parts"].values(), SHARES, strict=True)
    )
    assert done == 12
    more = MixedSampler([*SHARES[:2], MixtureShare("new", "first", 1, [1] * 5)], BATCH, 3).settle(position)
    assert more["parts"] == {
        **{name: position["parts"][name] for name in ("a", "b")},
        "new": {"epoch": 0, "update": 0},
    }


def test_the_same_example_is_drawn_differently_in_two_parts_and_epochs() -> None:
    twice = Mixture([MixturePart(name, name, 1, Named("x", 4)) for name in ("a", "b")])
    updates = UpdateStream(twice, collate, twice.sampler(BATCH, 0))
    names = [name for update in itertools.islice(updates, 20) for part in ids(update) for name in part]
    assert len(set(names)) == len(names) == 80


def test_by_tokens_every_part_has_its_own_lengths() -> None:
    shares = [MixtureShare("long", "long", 1, [10] * 40), MixtureShare("short", "short", 1, [2] * 40)]
    sampler = MixedSampler(shares, BatchConfig(tokens=40, per_pass=20), 0)
    sizes = {"long": set[int](), "short": set[int]()}
    for number, update in enumerate(walk(sampler, 20)):
        sizes[sampler.draw(number).name] |= {len(part) for part in update}
    assert sizes == {"long": {2}, "short": {10}}


def test_evaluation_cuts_every_part_on_its_own_and_ids_name_the_part() -> None:
    batches = list(evaluation_batches(mixture(), collate, 4))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 3, 4, 1]
    assert batches[3].ids == ["b:b0", "b:b1", "b:b2", "b:b3"]
    first = list(evaluation_batches(mixture(), collate, 4, first=True))
    assert [batch.ids[0] for batch in first] == ["a:a0", "b:b0", "c:c0"]


def test_what_is_printed_and_refused() -> None:
    sampler = MixedSampler(SHARES, BATCH, 0)
    assert sampler.describe() == "4 examples an update = 2 x 2 passes (of one of first 75 %, second 25 %)"
    assert sampler.warnings() == []
    tiny = MixedSampler([*SHARES, MixtureShare("tiny", "x", 1, [1] * 3)], BATCH, 0)
    assert [line.partition(":")[0] for line in tiny.warnings()] == ["tiny"]
    with pytest.raises(ConfigError, match=r"training\.epochs=2: each part of a mixture has epochs of its own"):
        sampler.total_updates(2)
    with pytest.raises(DataError, match=r"b: example 1 has 9 tokens and regions, more than a pass of 8"):
        MixedSampler([SHARES[0], MixtureShare("b", "b", 1, [1, 9])], BatchConfig(tokens=8), 0)
    with pytest.raises(CheckpointError, match="does not say where the parts of a mixture"):
        sampler.settle({"epoch": 0, "update": 3})
