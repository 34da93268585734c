"""Optimal transport by IPOT against the release, and against exact plans."""

import itertools
from typing import Any

import pytest
import torch
from golden_compare import close
from golden_utils import load

from villa.models.uniter.pretraining import align, transport_plan

GOLDEN = load("pretrain", "ipot")


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: str(case["kw"]))
def test_distances_plans_and_gradients_equal_the_release(case: dict[str, Any]) -> None:
    options = {"iterations" if name == "iteration" else name: value for name, value in case["kw"].items()}
    words, regions = (GOLDEN[name].clone().requires_grad_() for name in ("x", "y"))
    found = align(words, regions, GOLDEN["x_pad"] == 0, GOLDEN["y_pad"] == 0, **options)
    found.distance.sum().backward()
    close(found.distance, case["dist"], 1e-6, "distance")
    close(found.cost, case["cost"], 1e-6, "cost")
    close(found.plan, case["T"], 1e-6, "plan")
    assert words.grad is not None
    assert regions.grad is not None
    close(words.grad, case["gx"], 1e-6, "gradient of the words")
    close(regions.grad, case["gy"], 1e-6, "gradient of the regions")


def random_problem(words: int = 5, regions: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    cost = torch.rand(2, words, regions, dtype=torch.float64)
    return cost, torch.ones(2, words, dtype=torch.bool), torch.ones(2, regions, dtype=torch.bool)


@pytest.mark.parametrize("inner", [1, 3])
def test_many_steps_give_the_cheapest_assignment(inner: int) -> None:
    """With as many words as regions, the cheapest plan is a permutation: all of them are tried."""
    cost, words, regions = random_problem()
    plan = transport_plan(cost, words, regions, beta=0.1, iterations=2000, inner=inner)
    for matrix, found in zip(cost, plan, strict=True):
        best = min(sum(matrix[i, p[i]] for i in range(5)) for p in itertools.permutations(range(5)))
        assert (matrix * found.T).sum() == pytest.approx(best.item() / 5, rel=1e-3)


def test_a_plan_spreads_equal_weights_and_leaves_padding_empty() -> None:
    cost, words, regions = random_problem(4, 6)
    words[0, 3:] = False
    regions[1, 2:] = False
    plan = transport_plan(cost, words, regions, iterations=200)
    for row in range(2):
        torch.testing.assert_close(plan[row].sum(0), words[row] / words[row].sum().double(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(plan[row].sum(1), regions[row] / regions[row].sum().double(), rtol=1e-3, atol=1e-4)
    assert not plan[0, :, 3:].any()
    assert not plan[1, 2:].any()


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    words, regions = torch.randn(1, 4, 8), torch.randn(1, 3, 8)
    plain = align(words, regions, torch.ones(1, 4).bool(), torch.ones(1, 3).bool())
    padded = align(
        torch.cat((words, torch.full((1, 2, 8), 7.0)), 1),
        torch.cat((regions, torch.full((1, 3, 8), -7.0)), 1),
        torch.arange(6)[None] < 4,
        torch.arange(6)[None] < 3,
    )
    torch.testing.assert_close(padded.distance, plain.distance)
    torch.testing.assert_close(padded.plan[:, :3, :4], plain.plan)


def test_autocast_does_not_reach_it() -> None:
    words, regions = GOLDEN["x"], GOLDEN["y"]
    masks = GOLDEN["x_pad"] == 0, GOLDEN["y_pad"] == 0
    plain = align(words, regions, *masks)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = align(words, regions, *masks)
        half = align(words.bfloat16(), regions.bfloat16(), *masks)
    assert torch.equal(mixed.distance, plain.distance)
    assert half.distance.dtype == torch.float32
    assert half.plan.dtype == torch.float32


def test_no_gradient_goes_through_the_plan() -> None:
    words = GOLDEN["x"].clone().requires_grad_()
    found = align(words, GOLDEN["y"], GOLDEN["x_pad"] == 0, GOLDEN["y_pad"] == 0)
    assert not found.plan.requires_grad
    assert found.distance.requires_grad
