"""Losses of classification heads against their formulas."""

import pytest
import torch

from villa.batch import Batch
from villa.errors import DataError
from villa.losses.classification import BinaryCrossEntropy, CrossEntropy
from villa.models.base import ModelOutput
from villa.registry import LOSSES

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])


def output(logits: torch.Tensor = LOGITS) -> ModelOutput:
    return ModelOutput(logits)


def batch(targets: torch.Tensor | None) -> Batch:
    return Batch(ids=["a", "b"], targets=targets)


def test_registered() -> None:
    assert LOSSES.get("cross_entropy") is CrossEntropy
    assert LOSSES.get("binary_cross_entropy") is BinaryCrossEntropy


def test_cross_entropy_is_the_mean_over_rows() -> None:
    loss = CrossEntropy()(output(), batch(torch.tensor([0, 2])))
    expected = -(LOGITS[0, 0] - LOGITS[0].logsumexp(0) + LOGITS[1, 2] - LOGITS[1].logsumexp(0)) / 2
    torch.testing.assert_close(loss, expected)


def test_cross_entropy_takes_a_target_for_each_of_an_examples_choices() -> None:
    logits = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1], [1, 0]])
    loss = CrossEntropy()(output(logits), batch(targets))
    torch.testing.assert_close(loss, -logits.log_softmax(-1)[torch.arange(4), targets.flatten()].mean())


def test_cross_entropy_weights_answers_by_their_scores() -> None:
    scores = torch.tensor([[1.0, 0.3, 0.0], [0.0, 0.0, 0.0]])
    likely = LOGITS[0] - LOGITS[0].logsumexp(0)
    loss = CrossEntropy()(output(), batch(scores))
    torch.testing.assert_close(loss, -(likely[0] + 0.3 * likely[1]) / 2)
    one_hot = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(
        CrossEntropy()(output(), batch(one_hot)), CrossEntropy()(output(), batch(torch.tensor([2, 0])))
    )


def test_binary_cross_entropy_sums_over_answers_and_averages_over_examples() -> None:
    targets = torch.tensor([[1.0, 0.3, 0.0], [0.0, 0.0, 0.6]])
    loss = BinaryCrossEntropy()(output(), batch(targets))
    probabilities = LOGITS.sigmoid()
    terms = targets * probabilities.log() + (1 - targets) * (1 - probabilities).log()
    torch.testing.assert_close(loss, -terms.sum(1).mean())


def test_binary_cross_entropy_takes_class_indices_as_one_hot() -> None:
    loss = BinaryCrossEntropy()
    indices, one_hot = torch.tensor([2, 0]), torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert loss(output(), batch(indices)).equal(loss(output(), batch(one_hot)))


@pytest.mark.parametrize("loss", [CrossEntropy(), BinaryCrossEntropy()])
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_a_loss_is_computed_in_fp32_or_wider(
    loss: CrossEntropy | BinaryCrossEntropy, dtype: torch.dtype, wide: torch.dtype
) -> None:
    logits = (1000 * LOGITS).to(dtype)  # a sum of their exponentials overflows in half precision
    value = loss(output(logits), batch(torch.tensor([0, 1])))
    assert value.dtype == wide
    assert value.isfinite()


@pytest.mark.parametrize(
    ("loss", "targets", "message"),
    [
        (CrossEntropy(), None, "the examples have no targets (first: 'a')"),
        (BinaryCrossEntropy(), None, "the examples have no targets (first: 'a')"),
        (CrossEntropy(), torch.rand(2, 4), "soft targets [2, 4] do not fit logits [2, 3]"),
        (CrossEntropy(), torch.zeros(2, 3, dtype=torch.long), "class indices [2, 3] do not fit logits [2, 3]"),
        (BinaryCrossEntropy(), torch.zeros(3, dtype=torch.long), "class indices [3] do not fit logits [2, 3]"),
        (BinaryCrossEntropy(), torch.rand(2, 4), "soft targets [2, 4] do not fit logits [2, 3]"),
    ],
)
def test_targets_of_the_wrong_form(
    loss: CrossEntropy | BinaryCrossEntropy, targets: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(DataError) as caught:
        loss(output(), batch(targets))
    assert message in str(caught.value)


def test_micro_batches_weigh_by_their_examples() -> None:
    assert CrossEntropy().count(batch(torch.tensor([[0, 1], [1, 0]]))) == 2
