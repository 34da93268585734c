from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from villa.batch import Batch
from villa.config.schema import BatchConfig
from villa.datasets.base import Example, Split
from villa.datasets.collation import collate
from villa.datasets.samplers import UpdateSampler
from villa.datasets.stream import UpdateStream, evaluation_batches, evaluation_plan
from villa.errors import DataError


class Numbers(Split):
    """Examples whose text is their index; one of them may be bad."""

    def __init__(self, count: int, bad: int | None = None) -> None:
        self.count, self.bad, self.read = count, bad, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        self.read += 1
        if index == self.bad:
            raise DataError(f"file.jsonl:{index}: no answer; mend it")
        return Example(str(index), torch.tensor([index + 1]))

    @property
    def lengths(self) -> Sequence[int]:
        return [1] * self.count


def stream(workers: int = 0, split: Numbers | None = None) -> UpdateStream:
    split = split or Numbers(22)
    sampler = UpdateSampler(split.lengths, BatchConfig(examples=6, per_pass=3), seed=3)
    return UpdateStream(split, collate, sampler, workers=workers)


def ids(update: list[Batch]) -> list[list[str]]:
    return [batch.ids for batch in update]


@pytest.mark.parametrize("workers", [0, 2])
def test_updates_follow_the_sampler_for_ever(workers: int) -> None:
    updates = stream(workers)
    plan = [update for epoch in range(3) for update in updates.sampler.epoch(epoch)]
    for expected in plan:
        assert ids(next(updates)) == [[str(index) for index in part] for part in expected]
    assert updates.position == {"epoch": 3, "update": 0}
    assert updates.waited > 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("served", [0, 3, 4, 9])
def test_a_position_leads_to_the_same_updates(workers: int, served: int) -> None:
    first = stream()
    for _ in range(served):
        next(first)
    second = stream(workers)
    next(second)  # prefetches beyond the update that it yields
    second.seek(dict(first.position))
    assert second.position == first.position
    assert [ids(next(second)) for _ in range(5)] == [ids(next(first)) for _ in range(5)]


def test_seeking_reads_no_data() -> None:
    split = Numbers(22)
    updates = stream(split=split)
    updates.seek({"epoch": 5, "update": 2})
    assert split.read == 0
    next(updates)
    assert split.read == 6


def test_a_position_past_an_epoch_is_the_next_epoch() -> None:
    updates = stream()
    updates.seek({"epoch": 0, "update": 4})
    assert updates.position == {"epoch": 1, "update": 0}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_data_is_one_line_even_from_a_worker(workers: int) -> None:
    updates = stream(workers, Numbers(22, bad=5))
    with pytest.raises(DataError) as caught:
        list(itertools.islice(updates, 4))
    assert str(caught.value) == "file.jsonl:5: no answer; mend it"
    updates.close()  # the exception keeps the stream alive


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generator_is_left_alone(workers: int) -> None:
    before = torch.get_rng_state()
    next(stream(workers))
    next(evaluation_batches(Numbers(5), collate, 2, workers))
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_in_order_and_complete(workers: int) -> None:
    batches = list(evaluation_batches(Numbers(10), collate, 4, workers))
    assert ids(batches) == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["8", "9"]]


class Drawn(Numbers):
    """Examples whose id shows the seed of their random parts."""

    def draw(self, index: int, seed: int) -> Example:
        return Example(f"{index}:{seed}", torch.tensor([1]))


def test_every_epoch_draws_examples_anew_and_a_position_draws_the_same() -> None:
    first, again = stream(split=Drawn(6)), stream(split=Drawn(6))
    epochs = [ids(next(first)) for _ in range(3)]
    assert len({name for update in epochs for part in update for name in part}) == 18
    again.seek({"epoch": 2, "update": 0})
    assert ids(next(again)) == epochs[2]
    assert [batch.ids for batch in evaluation_batches(Drawn(2), collate, 2)] == [["0", "1"]]


class Long(Numbers):
    """Examples of many lengths."""

    @property
    def lengths(self) -> Sequence[int]:
        return [1 + index * 7 % 13 for index in range(self.count)]


class Sequential(Long):
    sequential = True


def test_evaluation_by_length_has_every_example_once_and_the_longest_of_a_stretch_first() -> None:
    split, stretch = Long(1000), 64 * 4
    plan = evaluation_plan(split, 4, by_length=True)
    order = [index for batch in plan for index in batch]
    assert {len(batch) for batch in plan} == {4}
    for start in range(0, 1000, stretch):
        part, known = order[start : start + stretch], range(start, min(start + stretch, 1000))
        assert part == sorted(known, key=lambda index: (-split.lengths[index], index))
    batches = evaluation_batches(split, collate, 4, by_length=True)
    assert [[int(name) for name in batch.ids] for batch in batches] == [[*batch] for batch in plan]  # type: ignore[union-attr]
    assert evaluation_plan(split, 4, by_length=True, first=True) == plan[:1]


def test_a_split_that_is_read_in_order_is_evaluated_in_order() -> None:
    assert [[*batch] for batch in evaluation_plan(Sequential(6), 4, by_length=True)] == [[0, 1, 2, 3], [4, 5]]
