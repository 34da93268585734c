"""Distances between tensors and those of the release: whole, and parameter by parameter."""

import torch
from torch import Tensor


def close(mine: Tensor, golden: Tensor, tolerance: float, what: str, *, floor: float = 0.0) -> None:
    """Relative distance as a whole; ``floor`` is the size below which a value is rounding noise."""
    error = (mine.detach().double() - golden.double()).norm()
    limit = max(tolerance * float(golden.double().norm()), floor)
    assert error <= limit, f"{what}: off by {error:.3e}, allowed {limit:.3e}"


def zero_gradient(name: str, value: Tensor) -> Tensor:
    """Which entries of a parameter have an analytically zero gradient (the keys' biases): rounding noise."""
    zero = torch.zeros_like(value, dtype=torch.bool)
    if name.endswith("attention.self.key.bias"):
        zero[:] = True
    if name.endswith("in_proj_bias"):
        zero[len(zero) // 3 : 2 * len(zero) // 3] = True
    return zero


def compare_together(mine: dict[str, Tensor], golden: dict[str, Tensor], tolerance: float, what: str) -> float:
    """All parameters as one vector; returns the length of the golden one."""
    assert set(golden) <= set(mine)
    kept = {name: ~zero_gradient(name, value) for name, value in golden.items()}
    mine_all = torch.cat([mine[name].detach()[kept[name]].flatten() for name in golden])
    golden_all = torch.cat([value[kept[name]].flatten() for name, value in golden.items()])
    close(mine_all, golden_all, tolerance, f"{what} of all parameters")
    return float(golden_all.norm())


def compare_parameters(mine: dict[str, Tensor], golden: dict[str, Tensor], tolerance: float, what: str) -> None:
    """All together within the tolerance; each within twice of it, as both sides round (7e-7 against fp64).

    A sum that cancels (a bias of one number) is off by its terms' rounding: 2 % of the whole's tolerance is free.
    """
    size = compare_together(mine, golden, tolerance, what)
    for name, value in golden.items():
        noise = zero_gradient(name, value)
        close(mine[name][~noise], value[~noise], 2 * tolerance, f"{what} of {name}", floor=0.02 * tolerance * size)
        if what == "gradient" and noise.any():
            assert mine[name][noise].abs().max() < tolerance * size
