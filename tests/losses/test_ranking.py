"""The margin losses against loops written by hand."""

import pytest
import torch
from torch import Tensor

from villa.batch import Batch
from villa.errors import ConfigError, DataError
from villa.losses.ranking import MarginConfig, MarginRanking, RegionRanking, RegionRankingConfig
from villa.models.base import ModelOutput
from villa.models.uniter.heads import PADDED_SCORE


def batch(targets: list[int], mask: Tensor | None = None) -> Batch:
    return Batch([str(i) for i in range(len(targets))], targets=torch.tensor(targets), region_mask=mask)


def test_margin_ranking_is_the_mean_over_all_wrong_pairs() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 4, dtype=torch.float64), [0, 0, 2, 3, 1]
    terms = []
    for row, right in enumerate(targets):
        for column in range(4):
            if column != right:
                terms.append(max(0.0, 0.3 + float(logits[row, column].sigmoid() - logits[row, right].sigmoid())))
    loss = MarginRanking(MarginConfig(margin=0.3))(ModelOutput(logits), batch(targets))
    assert float(loss) == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_margin_ranking_without_a_wrong_pair_is_zero() -> None:
    assert MarginRanking()(ModelOutput(torch.randn(3, 1)), batch([0, 0, 0])) == 0


def test_margin_ranking_is_computed_in_single_precision_or_wider() -> None:
    logits = torch.randn(3, 4).bfloat16()
    loss = MarginRanking()(ModelOutput(logits), batch([0, 0, 0]))
    assert loss.dtype == torch.float32
    assert loss == MarginRanking()(ModelOutput(logits.float()), batch([0, 0, 0]))


def test_regions_that_are_padding_or_right_are_never_drawn() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False], [True, True, False, False, False]])
    logits = torch.randn(3, 5).masked_fill(~mask, PADDED_SCORE)
    targets = torch.tensor([4, 1, 0])
    loss = RegionRanking()
    drawn = torch.stack([loss.negatives(logits, targets, batch([4, 1, 0], mask)) for _ in range(300)])
    assert {*drawn[:, 0].tolist()} == {0, 1, 2, 3}
    assert {*drawn[:, 1].tolist()} == {0, 2}
    assert {*drawn[:, 2].tolist()} == {1}


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_the_share_of_hard_regions(ratio: float) -> None:
    torch.manual_seed(0)
    rows = 3000
    logits = torch.zeros(rows, 10)
    logits[:, 9] = 3.0  # the right one, which scores best
    logits[:, 4] = 2.0
    targets = torch.full((rows,), 9)
    loss = RegionRanking(RegionRankingConfig(hard_ratio=ratio))
    drawn = loss.negatives(logits, targets, batch([9] * rows))
    expected = ratio + (1 - ratio) / 9
    assert (drawn == 4).double().mean().item() == pytest.approx(expected, abs=0.04)


def test_an_example_with_one_region_costs_nothing() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    logits = torch.tensor([[0.0, PADDED_SCORE], [0.0, 1.0]], requires_grad=True)
    loss = RegionRanking()(ModelOutput(logits), batch([0, 0], mask))
    assert loss.item() == pytest.approx((0.2 + torch.tensor(1.0).sigmoid().item() - 0.5) / 2)
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad[0].any()


def test_the_same_seed_draws_the_same_regions() -> None:
    logits = torch.randn(50, 8)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(RegionRanking().negatives(logits, torch.zeros(50, dtype=torch.long), batch([0] * 50)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("margin", [0.0, -0.1, 1.5, float("nan")])
def test_senseless_margins_are_refused(margin: float) -> None:
    with pytest.raises(ConfigError, match="margin"):
        MarginConfig(margin=margin).check()


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_senseless_shares_are_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match="hard_ratio"):
        RegionRankingConfig(hard_ratio=ratio).check()


@pytest.mark.parametrize("loss", [MarginRanking(), RegionRanking()])
def test_soft_or_missing_targets_are_refused(loss: MarginRanking) -> None:
    with pytest.raises(DataError, match="no targets"):
        loss(ModelOutput(torch.zeros(1, 2)), Batch(["a"]))
    with pytest.raises(DataError, match="soft"):
        loss(ModelOutput(torch.zeros(1, 2)), Batch(["a"], targets=torch.zeros(1, 2)))
