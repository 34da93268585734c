"""LXMERT's optimiser and schedule against their formulas."""

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from villa.engine.optimizers import BertAdam
from villa.registry import OPTIMIZERS, SCHEDULERS


def test_updates_follow_the_formula() -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    expected, m, v = parameter.detach().clone(), torch.zeros(4, 3), torch.zeros(4, 3)
    optimizer = BertAdam([parameter], lr=0.1)
    for lr in (0.0, 0.1, 0.03):
        gradient = torch.randn(4, 3, dtype=torch.float64)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        expected = expected - lr * (m / (v.sqrt() + 1e-6) + 0.01 * expected)
        parameter.grad = gradient
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        assert torch.allclose(parameter.detach(), expected, rtol=1e-12)


def test_by_default_every_parameter_decays() -> None:
    factory = OPTIMIZERS.get("bert_adam")
    optimizer: BertAdam = factory(factory.Config(lr=1e-3)).build(tiny_model())
    assert isinstance(optimizer, BertAdam)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(tiny_model().parameters()))


def factors(warmup: float, total: int) -> list[float]:
    schedule = SCHEDULERS.get("warmup_linear")
    made = schedule(schedule.Config(name="warmup_linear", warmup=warmup), total)
    return [made.factor(update) for update in range(1, total + 1)]


@pytest.mark.parametrize(("warmup", "total"), [(0.1, 10), (0.25, 10), (0.1, 37), (0.0, 5), (0.9, 8)])
def test_the_schedule_counts_from_zero(warmup: float, total: int) -> None:
    """x = (updates done) / total: x / w before the share w of warm-up, then (x - 1) / (w - 1)."""
    shares = [step / total for step in range(total)]
    expected = [x / warmup if x < warmup else (x - 1) / (warmup - 1) for x in shares]
    assert factors(warmup, total) == pytest.approx(expected, rel=1e-12)


def test_warmup_may_be_a_number_of_updates() -> None:
    assert factors(2, 10) == pytest.approx(factors(0.2, 10))
    assert factors(20, 10)[-1] == pytest.approx(9 / 20)
    assert factors(0.1, 10)[0] == 0.0


def test_state_survives_saving() -> None:
    def run(cut: bool) -> Tensor:
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = BertAdam([parameter])
        for step in range(4):
            parameter.grad = torch.full((3,), float(step))
            optimizer.step()
            if cut and step == 1:
                state = optimizer.state_dict()
                optimizer = BertAdam([parameter])
                optimizer.load_state_dict(state)
        return parameter.detach()

    assert torch.equal(run(cut=True), run(cut=False))
