"""The symmetric KL divergence against its formula."""

import pytest
import torch

from villa.batch import Batch
from villa.losses.base import Reduction, divergence
from villa.losses.classification import BinaryCrossEntropy
from villa.models.base import ModelOutput

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(4, 5, dtype=torch.float64, generator=GENERATOR)
CLEAN = torch.randn(4, 5, dtype=torch.float64, generator=GENERATOR)


def by_hand(logits: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """KL(p||q) + KL(q||p) of every row and label."""
    p, q = logits.softmax(-1), clean.softmax(-1)
    return p * (p / q).log() + q * (q / p).log()


def test_it_sums_over_labels_and_averages_over_rows() -> None:
    torch.testing.assert_close(divergence(LOGITS, CLEAN), by_hand(LOGITS, CLEAN).sum(1).mean())


def test_mean_averages_over_labels_too() -> None:
    torch.testing.assert_close(divergence(LOGITS, CLEAN, "mean"), by_hand(LOGITS, CLEAN).mean())


@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_it_is_symmetric_and_zero_on_equal_predictions(reduction: Reduction) -> None:
    torch.testing.assert_close(divergence(LOGITS, CLEAN, reduction), divergence(CLEAN, LOGITS, reduction))
    assert divergence(LOGITS, LOGITS + 3.0, reduction) == pytest.approx(0.0, abs=1e-14)
    assert divergence(LOGITS, CLEAN, reduction) > 0


def test_gradients_reach_both_sides() -> None:
    assert torch.autograd.gradcheck(divergence, (LOGITS.clone().requires_grad_(), CLEAN.clone().requires_grad_()))


def test_confident_predictions_stay_finite() -> None:
    far = torch.tensor([[1000.0, 0.0]])
    assert divergence(far, -far) == pytest.approx(2000.0)


def test_of_a_single_label_it_is_that_of_the_sigmoid() -> None:
    ours, theirs = torch.tensor([[0.3], [-2.0]], requires_grad=True), torch.tensor([[1.0], [0.5]])
    batch = Batch(["a", "b"])
    found = BinaryCrossEntropy().consistency(ModelOutput(ours), ModelOutput(theirs), batch)
    p, q = ours.sigmoid(), theirs.sigmoid()
    terms = (p - q) * (p.log() - q.log()) + (q - p) * ((1 - p).log() - (1 - q).log())
    torch.testing.assert_close(found, terms.mean())
    found.backward()  # type: ignore[no-untyped-call]
    assert ours.grad is not None
    assert bool((ours.grad != 0).all())
    several = torch.randn(2, 3), torch.randn(2, 3)
    of_three = BinaryCrossEntropy().consistency(*map(ModelOutput, several), batch)
    torch.testing.assert_close(of_three, divergence(*several))
