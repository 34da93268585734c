"""The arithmetic of a perturbation: initialisation, ascent step, projection.

A perturbation is a ``[rows, tokens, width]`` tensor; norms are taken over all tokens and widths of a row
(one row is one text with its image), as in Algorithm 1 of the VILLA paper, or of each token. In a perturbation of
pixels, a row is an image, a token a pixel and the width its channels. Initialisers, steps and projections are functions
by name: ``@STEPS.register("mine")`` adds one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from villa.errors import ConfigError, nearest

Norm = Literal["l2", "linf"]
Scope = Literal["row", "token"]
RelativeTo = Literal["none", "embedding", "table"]

#: Lower and upper bounds on a perturbation, of its shape, within which it starts and stays.
Bounds = tuple[Tensor, Tensor]

#: Lower bound on gradient norms (released code: ``clamp(min=1e-8)``).
SMALLEST_NORM = 1e-8

_ORDERS: dict[Norm, float] = {"l2": 2.0, "linf": math.inf}

F = TypeVar("F", bound=Callable[..., Tensor])


class Functions(Generic[F]):
    """Functions of one kind by name.

    Args:
        option: the option that names one, for messages.
    """

    def __init__(self, option: str) -> None:
        self.option = option
        self._known: dict[str, F] = {}

    def register(self, name: str) -> Callable[[F], F]:
        """Return a decorator that registers a function and returns it unchanged."""

        def decorate(function: F) -> F:
            self._known[name] = function
            return function

        return decorate

    def get(self, name: str) -> F:
        """Return the function called ``name``.

        Raises:
            ConfigError: there is none.
        """
        if name not in self._known:
            known = ", ".join(sorted(self._known))
            raise ConfigError(f"{self.option} is '{name}'{nearest(name, self._known)} (known: {known})")
        return self._known[name]


#: Fill a perturbation of zeros with numbers of magnitude 1, using a generator.
INITIALISERS: Functions[Callable[[Tensor, torch.Generator], Tensor]] = Functions("init")
#: Return the next perturbation from ``delta``, ``gradient``, step size and settings. What has no finite gradient (fp16
#: overflow) must stay where it is.
STEPS: Functions[Callable[[Tensor, Tensor, Tensor | float, AscentSettings], Tensor]] = Functions("step")
#: Return a perturbation within a radius above 0, from ``delta``, the radius and the settings.
PROJECTIONS: Functions[Callable[[Tensor, Tensor | float, AscentSettings], Tensor]] = Functions("projection")


@dataclass(frozen=True)
class AscentSettings:
    """Initialisation and ascent of one modality's perturbation.

    Attributes:
        step_size: length of an ascent step, in the norm.
        radius: largest norm; None or 0 does not project.
        norm: ``l2`` or ``linf``.
        init: distribution of the initial perturbation: ``zero``, ``uniform``, ``normal``, or another initialiser.
        init_scale: scale of the draw: for l2 the norm that entries of magnitude 1 get; for linf the magnitude.
        mask_padding: padding neither moves nor counts in a norm.
        fp32_gradient: round the gradient to fp32 even in fp64 runs, as the released code does.
        scope: norms are those of a whole ``row``, or of every ``token``.
        step: ``normalised``, ``sign``, ``raw``, ``power``, or another step.
        projection: ``ball``, ``sphere``, or another projection.
        relative_to: unit of step size, radius and scale: ``none`` is 1, ``embedding`` the norm of what is perturbed (of
            the row or token), ``table`` the mean norm of the rows of the embedding table.
        momentum: share of the last step's direction in the next one's.
        channels: factors on step size, radius and scale for every channel of pixels; None for 1. Only for linf.
    """

    step_size: float
    radius: float | None = None
    norm: Norm = "l2"
    init: str = "zero"
    init_scale: float = 0.0
    mask_padding: bool = True
    fp32_gradient: bool = False
    scope: Scope = "row"
    step: str = "normalised"
    projection: str = "ball"
    relative_to: RelativeTo = "none"
    momentum: float = 0.0
    channels: tuple[float, ...] | None = None

    @property
    def starts_at_zero(self) -> bool:
        """Whether the initial perturbation is zero."""
        return self.init == "zero" or self.init_scale == 0

    def check(self) -> None:
        """Raise ConfigError for names of functions that are not known."""
        INITIALISERS.get(self.init)
        STEPS.get(self.step)
        PROJECTIONS.get(self.projection)


def row_norm(values: Tensor, norm: Norm, scope: Scope = "row") -> Tensor:
    """Return the norm of every row or token, shaped ``[rows, 1, ...]`` or ``[rows, tokens, 1]`` for broadcasting."""
    dims = (-1,) if scope == "token" else tuple(range(1, values.dim()))
    norms: Tensor = torch.linalg.vector_norm(values, _ORDERS[norm], dims, keepdim=True)
    return norms


def flat_norm(values: Tensor, norm: Norm) -> Tensor:
    """Return the norm of every row, shaped ``[rows]``."""
    norms: Tensor = torch.linalg.vector_norm(values, _ORDERS[norm], tuple(range(1, values.dim())))
    return norms


def initialise(
    like: Tensor,
    settings: AscentSettings,
    mask: Tensor | None,
    seed: int,
    unit: Tensor | None = None,
    bounds: Bounds | None = None,
) -> Tensor:
    """Draw the initial perturbation.

    For l2, entries are scaled by ``init_scale / sqrt(tokens x width)`` of the row's real tokens (FreeLB, and
    line 4 of VILLA's Algorithm 1), or ``init_scale / sqrt(width)`` of a token; for linf by ``init_scale``.

    Args:
        like: the embedding ``[rows, tokens, width]`` that will be perturbed.
        settings: distribution, scale, norm.
        mask: ``[rows, tokens]`` bool, True where the perturbation may be non-zero; None for everywhere.
        seed: seed of the draw.
        unit: unit of the scale, broadcast to ``like``; None for 1.
        bounds: bounds on the result; None for none.

    Returns:
        A tensor like ``like``, in float32 or wider.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    delta = torch.zeros(like.shape, dtype=dtype, device=like.device)
    if settings.starts_at_zero:
        return delta
    delta = INITIALISERS.get(settings.init)(delta, torch.Generator(device=like.device).manual_seed(seed))
    if mask is not None:
        delta *= mask.unsqueeze(-1)
    scale = settings.init_scale if unit is None else settings.init_scale * unit
    if settings.norm == "linf":
        return _within(delta * scale, bounds)
    if settings.scope == "token":
        return _within(delta * (scale / math.sqrt(delta.shape[-1])), bounds)
    tokens = mask.sum(1) if mask is not None else torch.full((len(delta),), delta.shape[1], device=like.device)
    entries = (tokens * delta.shape[-1]).clamp_min(1).to(dtype)
    return _within(delta * (scale / entries.sqrt().view(-1, 1, 1)), bounds)


def ascend(
    delta: Tensor,
    gradient: Tensor,
    settings: AscentSettings,
    mask: Tensor | None,
    unit: Tensor | None = None,
    bounds: Bounds | None = None,
) -> Tensor:
    """Take an ascent step and project the result.

    Args:
        delta: the perturbation ``[rows, tokens, width]``.
        gradient: its gradient. Rows (or tokens) whose norm is not finite (fp16 overflow) take no step.
        settings: step, projection and their sizes.
        mask: ``[rows, tokens]`` bool, True where the perturbation may be non-zero; None for everywhere.
        unit: unit of the sizes, broadcast to ``delta``; None for 1.
        bounds: bounds on the result; None for none.
    """
    return project(advance(delta, gradient, settings, mask, unit), settings, unit, bounds)


def advance(
    delta: Tensor, gradient: Tensor, settings: AscentSettings, mask: Tensor | None, unit: Tensor | None = None
) -> Tensor:
    """Take an ascent step without projecting; see ``ascend``."""
    size = settings.step_size if unit is None else settings.step_size * unit
    return STEPS.get(settings.step)(delta, _masked(gradient, settings, mask), size, settings)


def direction(gradient: Tensor, before: Tensor | None, settings: AscentSettings, mask: Tensor | None) -> Tensor:
    """Return the direction of a step with momentum, to step along instead of the gradient.

    Each gradient counts by its own direction, not by its length, as in FARE's code.

    Args:
        gradient: see ``ascend``.
        before: direction of the last step, or None.
        settings: step and momentum.
        mask: see ``ascend``.
    """
    step, zero = STEPS.get(settings.step), torch.zeros_like(gradient)
    found = step(zero, _masked(gradient, settings, mask), 1.0, settings)
    return found if before is None else step(zero, settings.momentum * before + found, 1.0, settings)


def project(
    delta: Tensor, settings: AscentSettings, unit: Tensor | None = None, bounds: Bounds | None = None
) -> Tensor:
    """Project a perturbation to its radius, if it has one, and then to its bounds, if it has any.

    Bounds include 0, so that a clamp to them never takes a perturbation out of a ball around 0.
    """
    if not settings.radius:
        return _within(delta, bounds)
    radius = settings.radius if unit is None else settings.radius * unit
    return _within(PROJECTIONS.get(settings.projection)(delta, radius, settings), bounds)


def _masked(gradient: Tensor, settings: AscentSettings, mask: Tensor | None) -> Tensor:
    """Return a gradient in fp32 or wider, zero where the mask is False."""
    wide = torch.float32 if settings.fp32_gradient else torch.promote_types(gradient.dtype, torch.float32)
    gradient = gradient if gradient.dtype == wide else gradient.to(wide)
    return gradient if mask is None else gradient * mask.unsqueeze(-1)


def _within(delta: Tensor, bounds: Bounds | None) -> Tensor:
    return delta if bounds is None else delta.clamp(*bounds)


@INITIALISERS.register("zero")
def _zero(delta: Tensor, source: torch.Generator) -> Tensor:
    return delta


@INITIALISERS.register("uniform")
def _uniform(delta: Tensor, source: torch.Generator) -> Tensor:
    return delta.uniform_(-1, 1, generator=source)


@INITIALISERS.register("normal")
def _normal(delta: Tensor, source: torch.Generator) -> Tensor:
    return delta.normal_(generator=source)


def _unit_step(gradient: Tensor, size: Tensor | float, settings: AscentSettings) -> Tensor:
    norms = row_norm(gradient, settings.norm, settings.scope).clamp_min(SMALLEST_NORM)
    # What is divided by a norm that is infinite or NaN becomes 0 or NaN.
    return (size * gradient / norms).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)


@STEPS.register("normalised")
def _normalised(delta: Tensor, gradient: Tensor, size: Tensor | float, settings: AscentSettings) -> Tensor:
    return delta + _unit_step(gradient, size, settings)


@STEPS.register("power")
def _power(delta: Tensor, gradient: Tensor, size: Tensor | float, settings: AscentSettings) -> Tensor:
    """Go from zero along the gradient at ``delta``: the power iteration of VAT."""
    return _unit_step(gradient, size, settings)


@STEPS.register("sign")
def _sign(delta: Tensor, gradient: Tensor, size: Tensor | float, settings: AscentSettings) -> Tensor:
    return delta + size * torch.where(gradient.isfinite(), gradient.sign(), 0.0)


@STEPS.register("raw")
def _raw(delta: Tensor, gradient: Tensor, size: Tensor | float, settings: AscentSettings) -> Tensor:
    return delta + size * torch.where(gradient.isfinite(), gradient, 0.0)


@PROJECTIONS.register("ball")
def _ball(delta: Tensor, radius: Tensor | float, settings: AscentSettings) -> Tensor:
    """Scale (l2) or clamp (linf) what lies outside."""
    if settings.norm == "linf":
        return torch.clamp(delta, -radius, radius)  # type: ignore[arg-type] # numbers or tensors
    norms = row_norm(delta, "l2", settings.scope)
    return torch.where(norms > radius, delta * (radius / norms), delta)


@PROJECTIONS.register("sphere")
def _sphere(delta: Tensor, radius: Tensor | float, settings: AscentSettings) -> Tensor:
    """Scale to the radius; zero stays zero."""
    norms = row_norm(delta, settings.norm, settings.scope).clamp_min(SMALLEST_NORM)
    return delta * (radius / norms)
