"""The contrastive loss against transformers' own, and against sums written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from villa.batch import Batch
from villa.errors import DataError
from villa.losses.pretraining import Contrastive, ContrastiveConfig
from villa.models.base import ModelOutput


def loss_of(logits: Tensor, matches: Tensor | None, form: str = "softmax") -> Tensor:
    loss = Contrastive(ContrastiveConfig(form=form))  # type: ignore[arg-type]
    return loss(ModelOutput(logits), Batch([str(n) for n in range(len(logits))], targets=matches))


def test_softmax_is_that_of_clip() -> None:
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss_of(logits, torch.eye(5)), image_text_contrastive_loss(logits.T))


def test_sigmoid_is_that_of_siglip() -> None:
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(())
    for i in range(4):
        for j in range(4):
            sign = 1 if i == j else -1
            total = total - (sign * logits[i, j]).sigmoid().log()
    torch.testing.assert_close(loss_of(logits, torch.eye(4), "sigmoid"), total / 4)


def test_several_texts_of_one_image_share_the_right_answer() -> None:
    """Nothing is to be gained by telling them apart: the loss is lowest where both are as likely."""
    matches = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    logits = torch.zeros(3, 3, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=1.0)
    for _ in range(400):
        optimizer.zero_grad()
        loss_of(logits, matches).backward()
        optimizer.step()
    shares = logits.detach().softmax(-1)
    torch.testing.assert_close(shares[0], torch.tensor([0.5, 0.5, 0.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(shares[2], torch.tensor([0.0, 0.0, 1.0]), atol=0.02, rtol=0)


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_divergence(form: str) -> None:
    """Zero for equal logits; that of both directions, or of every pair, written out."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    loss = Contrastive(ContrastiveConfig(form=form))  # type: ignore[arg-type]
    batch = Batch(["a", "b", "c"])
    assert loss.consistency(ModelOutput(ours), ModelOutput(ours), batch).item() == pytest.approx(0, abs=1e-12)
    found = loss.consistency(ModelOutput(ours), ModelOutput(theirs), batch)

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        return ((p - q) * (p.log() - q.log())).sum()

    if form == "softmax":
        expected = divergence(ours.softmax(1), theirs.softmax(1)) + divergence(ours.softmax(0), theirs.softmax(0))
        expected = expected / 2 / 3
    else:
        p, q = ours.sigmoid(), theirs.sigmoid()
        expected = (divergence(p, q) + divergence(1 - p, 1 - q)) / 3
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("targets", [None, torch.arange(3), torch.ones(3, 2)])
def test_other_targets_are_refused_in_one_line(targets: Tensor | None) -> None:
    with pytest.raises(DataError, match=r"dataset\.target=pair") as caught:
        loss_of(torch.randn(3, 3), targets)
    assert "\n" not in str(caught.value)
