from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from villa.batch import Batch
from villa.errors import DataError
from villa.evaluation.metrics import Accuracy, Metric, SoftAccuracy
from villa.models.base import ModelOutput
from villa.registry import METRICS


def _batch(targets: torch.Tensor | None, rows: int) -> Batch:
    return Batch(ids=[str(i) for i in range(rows)], targets=targets)


def _update(metric: Metric, logits: Any, targets: torch.Tensor | None) -> None:
    metric.update(ModelOutput(torch.as_tensor(logits)), _batch(targets, len(logits)))


def test_accuracy_counts_argmax_hits_over_uneven_batches() -> None:
    metric = Accuracy()
    _update(metric, [[0.0, 1.0], [2.0, 1.0], [0.0, 3.0]], torch.tensor([1, 1, 1]))
    _update(metric, [[5.0, 1.0]], torch.tensor([0]))
    assert metric.compute() == {"accuracy": 0.75}


def test_soft_accuracy_is_the_score_of_the_chosen_answer() -> None:
    metric = SoftAccuracy()
    targets = torch.tensor([[0.3, 1.0, 0.0], [0.6, 0.0, 0.9], [0.0, 0.0, 0.0]])
    _update(metric, [[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [1.0, 0.0, 0.0]], targets)
    assert metric.compute()["soft_accuracy"] == pytest.approx((0.3 + 0.9 + 0.0) / 3, abs=1e-7)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 1000))
def test_states_of_several_ranks_add_up_to_the_whole(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole, states = Accuracy(), []
    for size in sizes:
        logits = torch.randn(size, 3, generator=generator)
        targets = torch.randint(3, (size,), generator=generator)
        rank = Accuracy()
        _update(rank, logits, targets)
        _update(whole, logits, targets)
        states.append(rank.state())
    merged = Accuracy()
    merged.load_states(states)
    assert merged.compute() == whole.compute()
    assert torch.equal(merged.state(), whole.state())


def test_sums_stay_exact_over_many_bfloat16_batches() -> None:
    metric = SoftAccuracy()
    for _ in range(300):
        _update(metric, torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16))
    assert metric.compute() == {"soft_accuracy": 1.0}


def test_reset_forgets_and_nothing_seen_is_an_error() -> None:
    metric = Accuracy()
    _update(metric, [[0.0, 1.0]], torch.tensor([1]))
    metric.reset()
    with pytest.raises(DataError, match="'accuracy': no examples were evaluated"):
        metric.compute()


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("accuracy", None, "the examples have no targets"),
        ("soft_accuracy", None, "the examples have no targets"),
        ("accuracy", torch.zeros(2, 3), r"float32 \[2, 3\]; use 'soft_accuracy'"),
        ("accuracy", torch.zeros(2), r"float32 \[2\]"),
        ("accuracy", torch.zeros(2, 4, dtype=torch.int64), r"int64 \[2, 4\]"),
        ("accuracy", torch.zeros(1, dtype=torch.int64), r"int64 \[1\]"),
        ("soft_accuracy", torch.zeros(2, dtype=torch.int64), r"int64 \[2\]; use 'accuracy'"),
        ("soft_accuracy", torch.zeros(2, 4), r"float32 \[2, 4\]"),
    ],
)
def test_targets_that_do_not_fit_are_one_clear_line(name: str, targets: torch.Tensor | None, message: str) -> None:
    metric = METRICS.get(name)()
    with pytest.raises(DataError, match=message) as error:
        _update(metric, torch.zeros(2, 3), targets)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
