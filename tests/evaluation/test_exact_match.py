"""Whole answers: right only if every token is."""

from __future__ import annotations

import pytest
import torch

from villa.batch import Batch
from villa.errors import DataError
from villa.evaluation.metrics import ExactMatch
from villa.losses.classification import LanguageModel
from villa.models.base import ModelOutput

MASK = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0]]).bool()
TARGETS = torch.tensor([4, 2, 3, 2, 2])


def batch() -> Batch:
    return Batch(["a", "b", "c"], torch.ones(3, 4).long(), answer_mask=MASK, targets=TARGETS)


def logits(tokens: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), 6).float()


@pytest.mark.parametrize(
    ("written", "expected"),
    [([4, 2, 3, 2, 2], 1.0), ([4, 0, 3, 2, 2], 2 / 3), ([0, 2, 3, 0, 2], 1 / 3), ([0, 0, 0, 0, 0], 0.0)],
)
def test_every_token_counts(written: list[int], expected: float) -> None:
    metric = ExactMatch()
    metric.update(ModelOutput(logits(written)), batch())
    assert metric.compute() == {"exact_match": pytest.approx(expected)}


def test_an_example_without_answer_tokens_is_refused() -> None:
    with pytest.raises(DataError, match=r"dataset\.target=text"):
        ExactMatch().update(ModelOutput(logits([1])), Batch(["a"], targets=torch.tensor([1])))


def test_the_loss_is_the_mean_over_answer_tokens_and_weighs_micro_batches_by_them() -> None:
    scores = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    expected = -scores.log_softmax(-1)[torch.arange(5), TARGETS].mean()
    loss = LanguageModel()
    torch.testing.assert_close(loss(ModelOutput(scores), batch()), expected)
    assert loss.count(batch()) == 5
