"""Finite differences: does the loss move as its gradient says?"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from villa.adversarial.ascent import AscentSettings
from villa.adversarial.perturbation import Perturbation
from villa.analysis.attacks import Attack, Ball
from villa.analysis.victim import DrawnPerturbation, Victim
from villa.registry import register_attack

#: Lengths of steps along the gradient and along a random direction, in norms of what is perturbed. The best one counts:
#: short steps suffer from rounding, long ones from curvature. Along a random direction, the loss changes less.
_ALONG, _ACROSS = (1e-4, 1e-3, 1e-2), (1e-3, 1e-2, 1e-1)


@register_attack("finite_difference")
class FiniteDifference(Attack):
    """No attack, but steps forth and back along the gradient and a random direction, for a check of the gradient."""

    nested: ClassVar[bool] = False
    exact: ClassVar[bool] = True

    def search(self, victim: Victim, ball: Ball) -> None:
        """Compare differences of the loss with the gradient; set the victim's ``slope_errors``."""
        settings = AscentSettings(0.0, 1.0, init_scale=1.0, projection="sphere", relative_to="embedding")
        start: dict[str, Perturbation] = {key: DrawnPerturbation(settings, victim.seeds(key)) for key in ball.keys}
        victim.run(start, gradient=True, wide=True)
        gradients = {key: one.trained().grad for key, one in start.items()}
        given = {key: torch.zeros_like(start[key].trained()) if g is None else g for key, g in gradients.items()}
        along = {key: _scaled(given[key], one) for key, one in start.items()}
        across = {key: _random(one, victim.seeds(key, "direction")) for key, one in start.items()}
        errors = []
        for direction, lengths in ((along, _ALONG), (across, _ACROSS)):
            tried = [_error(victim, start, given, direction, length) for length in lengths]
            errors.append(torch.stack(tried).amin(0))
        victim.slope_errors = torch.stack(errors).amax(0)

    def passes(self) -> tuple[int, int]:
        """Return the pass with the gradient, and two for each step."""
        return 1 + 2 * len(_ALONG + _ACROSS), 1


def _scaled(gradient: Tensor, at: Perturbation) -> Tensor:
    """Return the gradient with the norm, row by row, of what is perturbed; zero where it is zero or not finite."""
    norms = torch.linalg.vector_norm(gradient, dim=(1, 2), keepdim=True)
    unit = at.unit if at.unit is not None else 1.0
    return torch.where(norms > 0, gradient / norms * unit, 0.0).nan_to_num(0.0, 0.0, 0.0)


def _random(at: Perturbation, seeds: list[int]) -> Tensor:
    """Return a random direction with the norm, row by row, of what is perturbed."""
    drawn = DrawnPerturbation(replace(at.settings, init="normal"), seeds)
    drawn.mask, drawn.unit = at.mask, at.unit
    return drawn.start(at.trained().detach())


def _error(
    victim: Victim,
    start: dict[str, Perturbation],
    gradients: dict[str, Tensor],
    direction: dict[str, Tensor],
    length: float,
) -> Tensor:
    """Return by how much the difference of two losses misses the one that the gradient says, relative, ``[B]``.

    1 where neither changes, though something was moved.
    """
    steps = {key: _inside(length * along, start[key]) for key, along in direction.items()}
    losses = []
    for sign in (1, -1):
        moved = {key: Perturbation(start[key].settings, initial=sign * step) for key, step in steps.items()}
        losses.append(victim.run(moved, wide=True).double())
    difference = (losses[0] - losses[1]) / 2
    count = len(difference)

    def total(values: dict[str, Tensor]) -> Tensor:
        return sum((v.double().reshape(count, -1).sum(1) for v in values.values()), torch.zeros(count))

    said = total({key: gradients[key].double() * step for key, step in steps.items()})
    sizes = [total({key: each**2 for key, each in values.items()}).sqrt() for values in (gradients, steps)]
    entries = total({key: (step != 0).double() for key, step in steps.items()})
    typical = sizes[0] * sizes[1] / entries.clamp_min(1).sqrt()  # of a random direction
    scale = torch.stack((difference.abs(), said.abs(), typical)).amax(0)
    error = torch.where(scale > 0, (difference - said).abs() / scale, (entries > 0).double())
    return error.nan_to_num(1.0, 1.0, 1.0).cpu()


def _inside(step: Tensor, at: Perturbation) -> Tensor:
    """Return a step, without the entries whose colours would leave their bounds forth or back."""
    if at.bounds is None:
        return step
    return torch.where(step.abs() <= torch.minimum(-at.bounds[0], at.bounds[1]), step, 0.0)
