"""An epoch's cut is a fixed function of the data, the options, the seed and the epoch, and takes little memory."""

from __future__ import annotations

import hashlib
import json
import tracemalloc

import numpy as np
import pytest

from villa.config.schema import BatchConfig
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
    assert len(epoch.order) == count
    assert kept < 5 * count  # 4 for the index; lists of Python's integers take 40
    assert peak < 24 * count
