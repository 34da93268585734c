"""An epoch's cut is a fixed function of the data, the options, the seed and the epoch, and takes little memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import tracemalloc

import numpy as np
import pytest
from golden_utils import GOLDEN

from villa.config.schema import BatchConfig
from villa.datasets.epochs import cut_by_tokens
from villa.datasets.samplers import UpdateSampler

LENGTHS = np.random.default_rng(3).integers(5, 60, 3000)


@pytest.mark.parametrize(
    ("batch", "digest"),
    [
        (BatchConfig(examples=70, per_pass=9), "b9cb338d33a40b11"),
        (BatchConfig(examples=64, drop_last=True), "89cd33df140fcaba"),
        (BatchConfig(tokens=1000, per_pass=500, bucket=128, multiple=8), "0409feb07c94cfbe"),
        (BatchConfig(tokens=3000, drop_last=True), "1002c4e9b2a2f488"),
    ],
)
@pytest.mark.parametrize("kind", [list, np.asarray])
def test_the_order_is_the_one_of_the_first_release_for_lists_and_arrays(
    batch: BatchConfig, digest: str, kind: type
) -> None:
    sampler = UpdateSampler(kind(LENGTHS.tolist()), batch, 11)
    order = json.dumps([list(sampler.epoch(epoch)) for epoch in (0, 5)])
    assert hashlib.sha256(order.encode()).hexdigest()[:16] == digest


def test_batches_of_real_tokens_are_as_full_as_they_can_be() -> None:
    batch = BatchConfig(tokens=2000, per_pass=500, bucket=300, sampler="real")
    real, tight = (
        UpdateSampler(LENGTHS, dataclasses.replace(batch, sampler=s), 11).epoch(0) for s in ("real", "tight")
    )  # type: ignore[arg-type]
    parts = [part for update in real for part in update]
    assert sorted(index for part in parts for index in part) == list(range(3000))
    sizes = [int(LENGTHS[part].sum()) for part in parts]
    assert max(sizes) <= 500
    assert sum(size + int(LENGTHS[part].max()) <= 500 for size, part in zip(sizes, parts, strict=True)) <= 1
    assert len(parts) < sum(map(len, tight))


def test_an_epoch_reads_like_a_list_of_updates() -> None:
    epoch = UpdateSampler(LENGTHS, BatchConfig(examples=70, per_pass=9), 0).epoch(0)
    updates = list(epoch)
    assert (len(updates), len(epoch)) == (43, 43)  # 42 of 70, one of 60
    assert [len(part) for part in epoch[-1]] == [9, 9, 9, 9, 8, 8, 8]
    assert epoch[40:] == updates[40:]
    assert all(type(index) is int for part in epoch[0] for index in part)
    with pytest.raises(IndexError):
        epoch[43]
    assert epoch != updates


@pytest.mark.parametrize("batch", [BatchConfig(examples=512, per_pass=64), BatchConfig(tokens=20480, per_pass=10240)])
def test_an_epoch_takes_no_more_than_a_few_bytes_an_example(batch: BatchConfig) -> None:
    count = 300_000
    sampler = UpdateSampler(np.resize(LENGTHS, count).astype(np.int32), batch, 0)
    tracemalloc.start()
    epoch = sampler.epoch(0)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(epoch.batches.values) == count
    assert kept < 5 * count  # 4 for the index; lists of Python's integers take 40
    assert peak < 24 * count


@pytest.mark.parametrize("case", range(4))
def test_released_batches_are_those_of_the_released_sampler(case: int) -> None:
    golden = json.loads((GOLDEN / "misc" / "token_bucket_sampler.json").read_text())
    lengths, given = np.array(golden["lens"]), golden["cases"][case]
    options, draws = given["kw"], random.Random(given["seed"])
    batch = BatchConfig(
        tokens=options["batch_size"],
        bucket=options["bucket_size"],
        multiple=options.get("size_multiple", 8),
        drop_last=options["droplast"],
        sampler="released",
    )
    for released in (given["epoch1"], given["epoch2"]):
        order = list(range(len(lengths)))
        draws.shuffle(order)
        cut = cut_by_tokens(np.array(order), lengths, options["batch_size"], 1, batch, np.random.default_rng(0))
        ours = sorted(part for update in cut for part in update)
        assert ours == sorted(released)
        draws.shuffle(released)  # as the release did after cutting, so that the next epoch's draws are its own


def test_an_update_that_is_longer_than_an_epoch_goes_on_in_the_next_one() -> None:
    batch = BatchConfig(tokens=240, per_pass=80, multiple=8, sampler="released")
    (update,) = UpdateSampler([10] * 8, batch, 0).epoch(0)
    assert [sorted(part) for part in update] == [list(range(8))] * 3
    (update,) = UpdateSampler([10] * 8, dataclasses.replace(batch, sampler="tight"), 0).epoch(0)
    assert [sorted(part) for part in update] == [list(range(8))]
