"""A universal perturbation: one for all examples, found on others (Moosavi-Dezfooli et al., CVPR 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from villa.adversarial.ascent import AscentSettings, advance, initialise, project
from villa.adversarial.perturbation import Perturbation
from villa.analysis.attacks import REACH, Attack, Ball
from villa.analysis.victim import Victim, is_pixels
from villa.errors import ConfigError
from villa.registry import register_attack
from villa.rng import derive_seed


class SharedPerturbation(Perturbation):
    """The part of a shared perturbation that the rows of a batch have tokens for, in each row's own unit.

    Args:
        settings: norm and unit.
        shared: ``[1, tokens, width]``; what it lacks is 0.
    """

    def __init__(self, settings: AscentSettings, shared: Tensor | None) -> None:
        super().__init__(settings)
        self.shared = shared

    def start(self, values: Tensor) -> Tensor:
        """Return the shared perturbation for every row of ``values``."""
        delta = torch.zeros_like(values, dtype=torch.promote_types(values.dtype, torch.float32))
        if self.shared is not None:
            tokens = min(values.shape[1], self.shared.shape[1])
            delta[:, :tokens] = self.shared[:, :tokens].to(delta)
        delta = self._measured_in_units(delta)
        return delta if self.bounds is None else delta.clamp(*self.bounds)

    def pull(self) -> Tensor:
        """Return the gradient of the sum of losses by the shared perturbation."""
        grad = self.trained().grad
        found = torch.zeros_like(self.trained()) if grad is None else grad.nan_to_num(0.0, 0.0, 0.0)
        return self._measured_in_units(found).sum(0, keepdim=True)

    def _measured_in_units(self, values: Tensor) -> Tensor:
        values = values if self.mask is None else values * self.mask.unsqueeze(-1)
        return values if self.unit is None else values * self.unit


@register_attack("universal")
class Universal(Attack):
    """One perturbation for all examples, by projected gradient steps on the mean loss of held-out examples."""

    nested: ClassVar[bool] = False
    learns: ClassVar[bool] = True

    def search(self, victim: Victim, ball: Ball) -> None:
        """Run the perturbation that is best for the held-out examples, which is searched for once."""
        assert victim.held_out is not None
        known = victim.held_out.found
        key = (ball, self.steps, self.restarts, victim.measure.objective)
        if key not in known:
            known[key] = self._find(victim.held_out.victims(victim), ball)
        victim.run({name: SharedPerturbation(_settings(ball, name), own) for name, own in known[key].items()})

    def passes(self) -> tuple[int, int]:
        """Return the passes with as many held-out examples, and that on the perturbation."""
        starts = self.restarts + 1
        return starts * (self.steps + 1) + 1, starts * self.steps

    def _find(self, others: list[Victim], ball: Ball) -> dict[str, Tensor]:
        best, most = dict[str, Tensor](), -torch.inf
        shared: Mapping[str, Tensor] = {}
        for draw in range(self.restarts + 1):
            if draw:
                shared = {name: _drawn(each, ball, name, draw) for name, each in best.items()}
            for step in range(self.steps + 1):
                loss, pulls = _passes(others, ball, shared, gradient=step < self.steps)
                shared = {name: shared.get(name, torch.zeros_like(pull)) for name, pull in pulls.items()} or shared
                if loss > most or not best:
                    best, most = dict(shared), loss
                if pulls:
                    shared = {name: self._moved(own, pulls[name], ball, name) for name, own in shared.items()}
            shared = {}
        return best

    def _moved(self, shared: Tensor, pull: Tensor, ball: Ball, name: str) -> Tensor:
        settings = replace(_settings(ball, name), relative_to="none", step_size=REACH / self.steps * ball.radius)
        return project(advance(shared, pull, settings, None), settings)


def _settings(ball: Ball, name: str) -> AscentSettings:
    settings = ball.settings(1.0)
    return replace(settings, relative_to="none") if is_pixels(name) else settings


def _drawn(like: Tensor, ball: Ball, name: str, draw: int) -> Tensor:
    """Return a random start within the ball."""
    settings = replace(_settings(ball, name), init="uniform", relative_to="none")
    return project(initialise(like, settings, None, derive_seed("universal", name, draw)), settings)


def _passes(
    others: list[Victim], ball: Ball, shared: Mapping[str, Tensor], *, gradient: bool
) -> tuple[float, dict[str, Tensor]]:
    """Return the sum of the losses of all examples, and its gradient by the shared perturbation."""
    total, pulls = 0.0, dict[str, Tensor]()
    for other in others:
        used = {name: SharedPerturbation(_settings(ball, name), shared.get(name)) for name in ball.keys}
        total += float(other.run(dict(used), gradient=gradient).double().sum())
        for name, one in used.items() if gradient else ():
            pulls[name] = _sum(pulls.get(name), one.pull(), name)
    return total, pulls


def _sum(before: Tensor | None, pull: Tensor, name: str) -> Tensor:
    """Add gradients ``[1, tokens, width]``, the shorter one filled up with zeros."""
    if before is None:
        return pull
    if is_pixels(name) and before.shape != pull.shape:
        raise ConfigError(
            "attack 'universal' needs images of one size, but those of the held-out examples differ; take another "
            "attack, or perturb the image's embedding (robustness.points={})"
        )
    longer, shorter = (before, pull) if before.shape[1] >= pull.shape[1] else (pull, before)
    found = longer.clone()
    found[:, : shorter.shape[1]] += shorter
    return found
