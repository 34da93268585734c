"""Attacks at a model's perturbation points: noise, FGM, PGD and APGD."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from villa.adversarial.ascent import AscentSettings, Norm, RelativeTo, Scope, advance, project
from villa.adversarial.perturbation import Perturbation
from villa.analysis.victim import DrawnPerturbation, Victim, is_pixels, rows_of_each
from villa.registry import register_attack

#: Length of a step of PGD times the number of steps, in radii (Madry et al., 2018).
REACH = 2.5


@dataclass(frozen=True)
class Ball:
    """The perturbations that an attack may use.

    Attributes:
        keys: what is perturbed, together: names of perturbation points.
        radius: largest size.
        norm: ``l2`` or ``linf``.
        scope: the norm is that of a whole ``row``, or of each ``token``.
        relative_to: unit of the radius; see ``AscentSettings``. That of pixels is 1.
    """

    keys: tuple[str, ...]
    radius: float
    norm: Norm = "l2"
    scope: Scope = "row"
    relative_to: RelativeTo = "embedding"

    def settings(self, step: float, *, init: str = "zero", projection: str = "ball") -> AscentSettings:
        """Return the settings of a perturbation whose steps are ``step`` radii long."""
        return AscentSettings(
            step_size=step * self.radius,
            radius=self.radius,
            norm=self.norm,
            init=init,
            init_scale=self.radius,
            scope=self.scope,
            step="normalised" if self.norm == "l2" else "sign",
            projection=projection,
            relative_to=self.relative_to,
        )

    def begin(
        self, victim: Victim, settings: AscentSettings, draw: int, *, warm: bool = False
    ) -> dict[str, Perturbation]:
        """Create perturbations by modality.

        Args:
            victim: the batch.
            settings: see ``settings``.
            draw: number of the random draw.
            warm: start from the worst case so far, if there is one.
        """
        made: dict[str, Perturbation] = {}
        for key in self.keys:
            own = replace(settings, relative_to="none") if is_pixels(key) else settings
            made[key] = DrawnPerturbation(own, victim.seeds(key, draw), initial=victim.kept.get(key) if warm else None)
        return made


class Method(ABC):
    """What is common to attacks of all kinds. Subclass ``Attack`` or ``WordAttack``.

    Attributes:
        space: what is searched: perturbations of the ``embedding``, or other ``words`` in the input.
        learns: whether it learns from held-out examples.
    """

    space: ClassVar[Literal["embedding", "words"]]
    learns: ClassVar[bool] = False


class Attack(Method):
    """A search for the perturbation within a ball that hurts most. ``@register_attack(name)`` registers a subclass.

    The victim keeps the worst case of every pass, so that an attack only has to run them.

    Args:
        steps: gradient steps of an iterated attack.
        restarts: random starts, besides the first one, which is from zero.

    Attributes:
        nested: whether a perturbation found in a smaller ball counts, and is gone on from.
        exact: whether its passes are in fp32, whatever the recipe's precision.
    """

    space = "embedding"
    nested: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def __init__(self, steps: int = 20, restarts: int = 0) -> None:
        self.steps, self.restarts = steps, restarts

    @abstractmethod
    def search(self, victim: Victim, ball: Ball) -> None:
        """Run passes of the victim on perturbations within the ball; stop when it is ``done()``."""

    @abstractmethod
    def passes(self) -> tuple[int, int]:
        """Return the largest numbers of forward and backward passes of a search."""


@register_attack("noise")
class Noise(Attack):
    """Random noise of the largest size: the control for all others."""

    nested: ClassVar[bool] = False

    def search(self, victim: Victim, ball: Ball) -> None:
        """Try one draw, and one for each restart: on the sphere (l2), or uniform (linf)."""
        init, projection = ("normal", "sphere") if ball.norm == "l2" else ("uniform", "ball")
        settings = ball.settings(0.0, init=init, projection=projection)
        for draw in range(self.restarts + 1):
            victim.run(ball.begin(victim, settings, draw))

    def passes(self) -> tuple[int, int]:
        """Return one forward pass a draw."""
        return self.restarts + 1, 0


@register_attack("fgm")
class FastGradient(Attack):
    """One step to the radius along the gradient, or its sign for linf (FGM, FGSM)."""

    nested: ClassVar[bool] = False

    def search(self, victim: Victim, ball: Ball) -> None:
        """Take the step."""
        _ascend(victim, ball.begin(victim, ball.settings(1.0), 0), 1)

    def passes(self) -> tuple[int, int]:
        """Return the pass with the gradient, and that on the perturbation."""
        return 2, 1


@register_attack("pgd")
class ProjectedGradient(Attack):
    """Steps of 2.5 radii in all along the gradient, each projected to the ball (PGD; Madry et al., ICLR 2018)."""

    def search(self, victim: Victim, ball: Ball) -> None:
        """Ascend from the worst case so far (or zero), then from random starts."""
        size = REACH / self.steps
        for draw in range(self.restarts + 1):
            settings = ball.settings(size, init="uniform" if draw else "zero")
            _ascend(victim, ball.begin(victim, settings, draw, warm=draw == 0), self.steps)

    def passes(self) -> tuple[int, int]:
        """Return a pass for each step, and the last one."""
        starts = self.restarts + 1
        return starts * (self.steps + 1), starts * self.steps


def _ascend(victim: Victim, perturbations: dict[str, Perturbation], steps: int) -> None:
    for _ in range(steps):
        if victim.done():
            return
        victim.run(perturbations, gradient=True)
        for perturbation in perturbations.values():
            perturbation.ascend()
    if not victim.done():
        victim.run(perturbations)


@register_attack("apgd")
class AutoProjectedGradient(Attack):
    """PGD with momentum whose steps are halved where they do not help (APGD; Croce and Hein, ICML 2020)."""

    #: Weight of the new step beside that of the last one.
    MOMENTUM: ClassVar[float] = 0.75
    #: Steps to the first checkpoint, by how many the next stretches are shorter, and their least length, as shares.
    FIRST, SHORTER, LEAST = 0.22, 0.03, 0.06
    #: Share of the steps since the last checkpoint that must have raised the loss.
    RISING: ClassVar[float] = 0.75

    def search(self, victim: Victim, ball: Ball) -> None:
        """Ascend from the worst case so far (or zero), then from random starts."""
        for draw in range(self.restarts + 1):
            settings = ball.settings(2.0, init="uniform" if draw else "zero")
            self._climb(victim, ball.begin(victim, settings, draw, warm=draw == 0))

    def _climb(self, victim: Victim, perturbations: dict[str, Perturbation]) -> None:
        if victim.done():
            return
        losses = victim.run(perturbations, gradient=True)
        state = _Climb(
            losses, {name: p.trained().detach() for name, p in perturbations.items()}, _gradients(perturbations)
        )
        checkpoints, stretch, last = _checkpoints(self.steps, self.FIRST, self.SHORTER, self.LEAST), 0, 0
        for step in range(1, self.steps + 1):
            for name, perturbation in perturbations.items():
                momentum = self.MOMENTUM if step > 1 else 1.0
                perturbation.delta = state.move(name, perturbation, momentum)
            if victim.done():
                return
            more = step < self.steps
            losses = victim.run(perturbations, gradient=more)
            state.follow(losses, perturbations, _gradients(perturbations) if more else {})
            if step in checkpoints and more:
                stretch, last = step - last, step
                state.settle(stretch, self.RISING)

    def passes(self) -> tuple[int, int]:
        """Return a pass for each step, and the last one."""
        starts = self.restarts + 1
        return starts * (self.steps + 1), starts * self.steps


class _Climb:
    """The state of APGD's ascent: steps and best points of every example.

    Args:
        losses: losses ``[B]`` at the start.
        deltas: the start, by modality.
        gradients: the gradients there.
    """

    def __init__(self, losses: Tensor, deltas: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
        self.now, self.before, self.gradients = dict(deltas), dict(deltas), dict(gradients)
        self.best, self.best_gradients = dict(deltas), dict(gradients)
        self.losses, self.most = losses, losses.clone()
        self.sizes = torch.ones_like(losses)
        self._most_then, self._rises = losses.clone(), torch.zeros_like(losses)
        self._halved = torch.ones_like(losses, dtype=torch.bool)  # nothing is halved for having stood still at first

    def move(self, name: str, perturbation: Perturbation, momentum: float) -> Tensor:
        """Return a modality's next point."""
        now, before = self.now[name], self.before[name]
        settings, unit, bounds = perturbation.settings, perturbation.unit, perturbation.bounds
        size = _rows(self.sizes, now) if unit is None else _rows(self.sizes, now) * unit
        there = project(advance(now, self.gradients[name], settings, perturbation.mask, size), settings, unit, bounds)
        return project(now + momentum * (there - now) + (1 - momentum) * (now - before), settings, unit, bounds)

    def follow(self, losses: Tensor, perturbations: dict[str, Perturbation], gradients: dict[str, Tensor]) -> None:
        """Take in the losses and gradients at the points that were moved to."""
        self._rises += (losses > self.losses).to(losses)
        better, self.losses = losses > self.most, losses
        self.most = torch.where(better, losses, self.most)
        for name, perturbation in perturbations.items():
            assert perturbation.delta is not None
            self.before[name], self.now[name] = self.now[name], perturbation.delta.detach()
            if name in gradients:
                self.gradients[name] = gradients[name]
                rows = _rows(better, self.now[name])
                self.best[name] = torch.where(rows, self.now[name], self.best[name])
                self.best_gradients[name] = torch.where(rows, gradients[name], self.best_gradients[name])

    def settle(self, steps: int, rising: float) -> None:
        """Halve the step where too few steps have raised the loss, or none since the last time, and go back."""
        stalled = self._rises < rising * steps
        stood = ~self._halved & (self._most_then >= self.most)
        halved = stalled | stood
        self.sizes = torch.where(halved, self.sizes / 2, self.sizes)
        for name, now in self.now.items():
            rows = _rows(halved, now)
            self.now[name] = torch.where(rows, self.best[name], now)
            self.before[name] = torch.where(rows, self.best[name], self.before[name])
            self.gradients[name] = torch.where(rows, self.best_gradients[name], self.gradients[name])
        self.losses = torch.where(halved, self.most, self.losses)
        self._halved, self._most_then, self._rises = halved, self.most.clone(), torch.zeros_like(self._rises)


def _gradients(perturbations: dict[str, Perturbation]) -> dict[str, Tensor]:
    found = {}
    for name, perturbation in perturbations.items():
        delta = perturbation.trained()
        found[name] = torch.zeros_like(delta) if delta.grad is None else delta.grad
    return found


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """Return values ``[B]`` for every row of ``like``, to broadcast."""
    each = rows_of_each(len(like), len(values))
    return values.repeat_interleave(each).view(-1, *[1] * (like.dim() - 1)).to(like.device)


def _checkpoints(steps: int, first: float, shorter: float, least: float) -> Sequence[int]:
    """Return the steps at which to look back: the first after 22 % of all, the next ones ever closer."""
    found: list[int] = []
    stretch = max(int(first * steps), 1)
    while not found or found[-1] < steps:
        found.append((found[-1] if found else 0) + stretch)
        stretch = max(stretch - max(int(shorter * steps), 1), int(least * steps), 1)
    return found
