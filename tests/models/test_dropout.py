"""Dropout on a CPU against what dropout is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from villa.models.dropout import Dropout, draw_fast, dropout


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.013])
def test_elements_are_dropped_at_the_rate_and_the_mean_stays(rate: float) -> None:
    torch.manual_seed(0)
    count = 1_000_003  # no multiple of four
    found = dropout(torch.ones(count, dtype=torch.float64), rate)
    share = (found == 0).double().mean().item()
    assert share == pytest.approx(rate, abs=4 * (rate * (1 - rate) / count) ** 0.5 + 2**-17)
    kept = found[found != 0].unique()
    assert len(kept) == 1
    assert kept.item() == pytest.approx(1 / (1 - rate), rel=2e-5)
    assert found.mean().item() == pytest.approx(1.0, abs=4 * (rate / (1 - rate) / count) ** 0.5)


def test_neighbours_and_passes_are_independent() -> None:
    torch.manual_seed(1)
    first, second = (dropout(torch.ones(400_000), 0.5) != 0 for _ in range(2))
    for lag in range(1, 9):
        assert abs(float((first[lag:] == first[:-lag]).double().mean()) - 0.5) < 0.005
    assert abs(float((first == second).double().mean()) - 0.5) < 0.005


def test_the_seed_and_nothing_else_selects_the_mask() -> None:
    values = torch.randn(7, 33)
    masks = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(5)
        masks.append(dropout(values, 0.3))
    torch.set_num_threads(1)
    assert torch.equal(*masks)
    torch.manual_seed(6)
    assert not torch.equal(masks[0], dropout(values, 0.3))


def test_the_gradient_is_that_of_the_mask() -> None:
    values = torch.randn(50, 9, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(2)
    dropped = dropout(values, 0.4)
    dropped.sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad * values.detach(), dropped.detach(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("rate", [0.0, 1.0, 1e-6])
def test_rates_that_sixteen_bits_cannot_tell_are_left_to_torch(rate: float) -> None:
    values = torch.randn(100, 100)
    torch.manual_seed(3)
    expected = F.dropout(values, rate)
    torch.manual_seed(3)
    assert torch.equal(dropout(values, rate), expected)


def test_evaluation_and_empty_values() -> None:
    values = torch.randn(4, 4)
    assert dropout(values, 0.5, training=False) is values
    assert dropout(torch.zeros(0, 3), 0.5).shape == (0, 3)
    assert dropout(torch.ones(()), 0.5).shape == ()


def test_layers_of_any_model_take_it() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Dropout(0.5, inplace=True), nn.AlphaDropout(0.5))
    draw_fast(model)
    assert [type(module) for module in model] == [nn.Linear, Dropout, nn.Dropout, nn.AlphaDropout]
    torch.manual_seed(4)
    expected = dropout(torch.ones(64, 4), 0.5)
    torch.manual_seed(4)
    assert torch.equal(model[1](torch.ones(64, 4)), expected)
    assert not model.eval()[1](torch.ones(64, 4)).eq(0).any()
