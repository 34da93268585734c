"""The arithmetic of perturbations against loops over rows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from villa.adversarial.ascent import STEPS, AscentSettings, ascend, initialise, project, row_norm
from villa.adversarial.injection import inject
from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.errors import ConfigError
from villa.models.base import Point

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


@pytest.mark.parametrize("step", ["normalised", "sign", "raw", "power"])
@pytest.mark.parametrize("projection", ["ball", "sphere"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("relative", [False, True])
def test_every_step_and_projection_follows_its_formula_token_by_token(
    step: str, projection: str, norm: str, relative: bool
) -> None:
    delta, gradient, mask = make()
    settings = AscentSettings(0.3, 0.7, norm, scope="token", step=step, projection=projection)  # type: ignore[arg-type]
    unit = torch.rand(ROWS, TOKENS, 1, dtype=torch.float64) + 0.5 if relative else None
    moved = ascend(delta, gradient, settings, mask, unit)
    for row, token in mask.nonzero().tolist():
        g, d, u = gradient[row, token], delta[row, token], 1.0 if unit is None else unit[row, token].item()
        order = 2.0 if norm == "l2" else math.inf
        expected = {
            "normalised": d + 0.3 * u * g / g.norm(order),
            "sign": d + 0.3 * u * g.sign(),
            "raw": d + 0.3 * u * g,
            "power": 0.3 * u * g / g.norm(order),
        }[step]
        if projection == "sphere":
            expected = expected * 0.7 * u / expected.norm(order)
        elif norm == "linf":
            expected = expected.clamp(-0.7 * u, 0.7 * u)
        elif expected.norm() > 0.7 * u:
            expected = expected * 0.7 * u / expected.norm()
        torch.testing.assert_close(moved[row, token], expected, rtol=1e-13, atol=1e-15)
    assert (moved[~mask] == 0).all()


@pytest.mark.parametrize("step", ["normalised", "sign", "raw"])
def test_a_token_with_an_overflown_gradient_stays_and_the_others_move(step: str) -> None:
    delta, gradient, _ = make()
    gradient[2, 0] = float("nan")
    moved = ascend(delta, gradient, AscentSettings(step_size=1.0, scope="token", step=step), None)
    assert torch.equal(moved[2, 0], delta[2, 0])
    assert not torch.equal(moved[2, 1], delta[2, 1])


@pytest.mark.parametrize("scope", ["row", "token"])
@pytest.mark.parametrize("relative_to", ["embedding", "table"])
def test_sizes_may_be_relative_to_the_embedding_or_to_its_table(scope: str, relative_to: str) -> None:
    table, ids = torch.nn.Embedding(20, WIDTH), torch.arange(TOKENS * ROWS).view(ROWS, TOKENS)
    mask = make()[2]
    settings = AscentSettings(0.2, 0.5, init="normal", init_scale=0.3, scope=scope, relative_to=relative_to)  # type: ignore[arg-type]
    plain = AscentSettings(0.2, 0.5, init="normal", init_scale=0.3, scope=scope)  # type: ignore[arg-type]
    perturbation = Perturbation(settings, seed=3)
    points = {"text": Point("0", "output", lambda _: mask)}
    with inject(torch.nn.Sequential(table), points, {"text": perturbation}, Batch(list("abcd"))):
        table(ids)
    embedding = table(ids).detach() * mask[..., None]
    unit = table.weight.norm(dim=1).mean() if relative_to == "table" else row_norm(embedding, "l2", scope)  # type: ignore[arg-type]
    assert perturbation.delta is not None
    first = perturbation.delta.detach()
    torch.testing.assert_close(first, initialise(embedding, plain, mask, 3) * unit)
    perturbation.delta.grad = torch.randn(ROWS, TOKENS, WIDTH)
    expected = ascend(first, perturbation.delta.grad, settings, mask, unit)
    perturbation.ascend()
    torch.testing.assert_close(perturbation.delta, expected)
    bound = 0.5 * unit.expand(ROWS, *unit.shape[1:]) if unit.dim() else 0.5 * unit
    assert (row_norm(perturbation.delta, "l2", scope) <= bound * (1 + 1e-5)).all()  # type: ignore[arg-type]


def test_a_step_of_ones_own_is_used_by_its_name() -> None:
    delta, gradient, mask = make()
    STEPS.register("backwards")(lambda delta, gradient, size, settings: delta - size * gradient)
    moved = ascend(delta, gradient, AscentSettings(0.5, step="backwards"), mask)
    torch.testing.assert_close(moved, delta - 0.5 * gradient * mask[..., None])
    with pytest.raises(ConfigError, match="step is 'backward'; did you mean 'backwards'"):
        AscentSettings(0.5, step="backward").check()


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
