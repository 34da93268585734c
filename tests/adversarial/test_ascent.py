"""The arithmetic of perturbations against loops over rows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from villa.adversarial.ascent import AscentSettings, ascend, initialise, project, row_norm

ROWS, TOKENS, WIDTH = 4, 5, 3


def make(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(TOKENS)[None] < torch.tensor([5, 3, 1, 4])[:, None]
    delta = torch.randn(ROWS, TOKENS, WIDTH, generator=draw, dtype=torch.float64) * mask[..., None]
    gradient = torch.randn(ROWS, TOKENS, WIDTH, generator=draw, dtype=torch.float64)
    return delta, gradient, mask


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("radius", [None, 0.0, 0.7])
def test_step_follows_the_formula_row_by_row(norm: str, radius: float | None) -> None:
    delta, gradient, mask = make()
    settings = AscentSettings(step_size=0.3, radius=radius, norm=norm)  # type: ignore[arg-type]
    moved = ascend(delta, gradient, settings, mask)
    for row in range(ROWS):
        g = gradient[row] * mask[row][:, None]
        size = g.norm() if norm == "l2" else g.abs().max()
        expected = delta[row] + 0.3 * g / size
        if radius and norm == "linf":
            expected = expected.clamp(-radius, radius)
        elif radius and expected.norm() > radius:
            expected = expected * (radius / expected.norm())
        torch.testing.assert_close(moved[row], expected, rtol=1e-14, atol=1e-15)


def test_padding_stays_zero_only_when_it_is_masked() -> None:
    delta, gradient, mask = make()
    masked = ascend(delta, gradient, AscentSettings(step_size=1.0), mask)
    assert (masked[~mask] == 0).all()
    released = ascend(delta, gradient, AscentSettings(step_size=1.0), None)
    assert (released[~mask] != 0).any()


def test_gradient_rounding_of_the_released_code() -> None:
    delta, gradient, _ = make()
    exact = ascend(delta, gradient, AscentSettings(step_size=1.0), None)
    rounded = ascend(delta, gradient, AscentSettings(step_size=1.0, fp32_gradient=True), None)
    assert rounded.dtype == torch.float64
    assert 0 < (exact - rounded).abs().max() < 1e-6


def test_a_row_with_an_overflown_gradient_stays_and_the_others_move() -> None:
    delta, gradient, _ = make()
    gradient[2, 0, 0] = float("inf")
    moved = ascend(delta, gradient, AscentSettings(step_size=1.0), None)
    assert torch.equal(moved[2], delta[2])
    assert moved.isfinite().all()
    assert not torch.equal(moved[1], delta[1])


def test_a_zero_gradient_does_not_divide_by_zero() -> None:
    delta, gradient, _ = make()
    assert torch.equal(ascend(delta, gradient * 0, AscentSettings(step_size=1.0), None), delta)


@given(
    radius=st.floats(1e-3, 10), step=st.floats(0, 100), norm=st.sampled_from(["l2", "linf"]), seed=st.integers(0, 99)
)
def test_projection_never_leaves_the_ball_and_keeps_what_is_inside(
    radius: float, step: float, norm: str, seed: int
) -> None:
    delta, gradient, mask = make(seed)
    settings = AscentSettings(step_size=step, radius=radius, norm=norm)  # type: ignore[arg-type]
    moved = ascend(project(delta, settings), gradient, settings, mask)
    assert (row_norm(moved, settings.norm) <= radius * (1 + 1e-12)).all()
    small = delta * (radius / (2 * row_norm(delta, "l2").max()))
    assert torch.equal(project(small, settings), small)


@pytest.mark.parametrize("init", ["uniform", "normal"])
def test_random_start_has_the_scale_of_freelb(init: str) -> None:
    like = torch.zeros(ROWS, TOKENS, 4000)
    _, _, mask = make()
    settings = AscentSettings(step_size=0, init=init, init_scale=0.6)  # type: ignore[arg-type]
    delta = initialise(like, settings, mask, seed=3)
    assert (delta[~mask] == 0).all()
    spread = 1 / math.sqrt(3) if init == "uniform" else 1.0  # standard deviation of an entry before scaling
    torch.testing.assert_close(row_norm(delta, "l2").flatten(), torch.full((ROWS,), 0.6 * spread), rtol=0.05, atol=0)
    assert torch.equal(delta, initialise(like, settings, mask, seed=3))
    assert not torch.equal(delta, initialise(like, settings, mask, seed=4))


def test_linf_start_fills_the_box() -> None:
    settings = AscentSettings(step_size=0, norm="linf", init="uniform", init_scale=0.1)
    delta = initialise(torch.zeros(2, 50, 50), settings, None, seed=0)
    assert 0.099 < delta.abs().max() <= 0.1
    assert abs(delta.mean()) < 0.005


def test_zero_start_is_zero_and_half_precision_is_widened() -> None:
    like = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    delta = initialise(like, AscentSettings(step_size=1.0), None, seed=0)
    assert delta.dtype == torch.float32
    assert not delta.any()
