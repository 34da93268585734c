"""The arithmetic of a perturbation: initialisation, normalised ascent step, projection.

A perturbation is a ``[rows, tokens, width]`` tensor; norms are taken over all tokens and widths of a row
(one row is one text with its image), as in Algorithm 1 of the VILLA paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["l2", "linf"]
Init = Literal["zero", "uniform", "normal"]

#: Lower bound on gradient norms (released code: ``clamp(min=1e-8)``).
SMALLEST_NORM = 1e-8


@dataclass(frozen=True)
class AscentSettings:
    """Initialisation and ascent of one modality's perturbation.

    Attributes:
        step_size: length of an ascent step, in the norm.
        radius: largest norm; None or 0 does not project.
        norm: ``l2`` or ``linf``.
        init: distribution of the initial perturbation.
        init_scale: scale of the draw: for l2 the norm that entries of magnitude 1 get; for linf the magnitude.
        mask_padding: padding neither moves nor counts in a norm.
        fp32_gradient: round the gradient to fp32 even in fp64 runs, as the released code does.
    """

    step_size: float
    radius: float | None = None
    norm: Norm = "l2"
    init: Init = "zero"
    init_scale: float = 0.0
    mask_padding: bool = True
    fp32_gradient: bool = False

    @property
    def starts_at_zero(self) -> bool:
        """Whether the initial perturbation is zero."""
        return self.init == "zero" or self.init_scale == 0


def row_norm(values: Tensor, norm: Norm) -> Tensor:
    """Return the norm of every row, shaped ``[rows, 1, ...]`` for broadcasting."""
    return flat_norm(values, norm).view(-1, *[1] * (values.dim() - 1))


def flat_norm(values: Tensor, norm: Norm) -> Tensor:
    """Return the norm of every row, shaped ``[rows]``."""
    norms: Tensor = torch.linalg.vector_norm(values.flatten(1), ord=2.0 if norm == "l2" else math.inf, dim=1)
    return norms


def initialise(like: Tensor, settings: AscentSettings, mask: Tensor | None, seed: int) -> Tensor:
    """Draw the initial perturbation.

    For l2, entries are scaled by ``init_scale / sqrt(tokens x width)`` of the row's real tokens (FreeLB, and
    line 4 of VILLA's Algorithm 1); for linf by ``init_scale``.

    Args:
        like: the embedding ``[rows, tokens, width]`` that will be perturbed.
        settings: distribution, scale, norm.
        mask: ``[rows, tokens]`` bool, True where the perturbation may be non-zero; None for everywhere.
        seed: seed of the draw.

    Returns:
        A tensor like ``like``, in float32 or wider.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    delta = torch.zeros(like.shape, dtype=dtype, device=like.device)
    if settings.starts_at_zero:
        return delta
    source = torch.Generator(device=like.device).manual_seed(seed)
    if settings.init == "uniform":
        delta.uniform_(-1, 1, generator=source)
    else:
        delta.normal_(generator=source)
    if mask is not None:
        delta *= mask.unsqueeze(-1)
    if settings.norm == "linf":
        return delta * settings.init_scale
    tokens = mask.sum(1) if mask is not None else torch.full((len(delta),), delta.shape[1], device=like.device)
    entries = (tokens * delta.shape[-1]).clamp_min(1).to(dtype)
    return delta * (settings.init_scale / entries.sqrt()).view(-1, 1, 1)


def ascend(delta: Tensor, gradient: Tensor, settings: AscentSettings, mask: Tensor | None) -> Tensor:
    """Take a normalised gradient step of length ``step_size`` and project it onto the ball of ``radius``.

    Rows with a non-finite gradient (fp16 overflow) take no step.
    """
    wide = torch.float32 if settings.fp32_gradient else torch.promote_types(gradient.dtype, torch.float32)
    gradient = gradient.to(wide)
    if mask is not None:
        gradient = gradient * mask.unsqueeze(-1)
    norms = row_norm(gradient, settings.norm).clamp_min(SMALLEST_NORM)
    step = settings.step_size * gradient / norms
    return project(delta + torch.where(norms < math.inf, step, 0.0), settings)  # NaN compares as False


def project(delta: Tensor, settings: AscentSettings) -> Tensor:
    """Project rows outside the ball of ``radius`` onto it; without a radius, return them unchanged."""
    if not settings.radius:
        return delta
    if settings.norm == "linf":
        return delta.clamp(-settings.radius, settings.radius)
    norms = row_norm(delta, "l2")
    return torch.where(norms > settings.radius, delta * (settings.radius / norms), delta)
