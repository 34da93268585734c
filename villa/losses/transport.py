"""Optimal transport between the words and the regions of a pair, by IPOT (Xie et al., 2020), as UNITER uses it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Norms below this count as this in the cosine (released code).
_SMALLEST_NORM = 1e-5


class Transport(NamedTuple):
    """How the words of B texts are aligned with the regions of their images.

    Attributes:
        distance: ``[B]`` cost of the plan; gradients flow through the costs, not through the plan.
        cost: ``[B, T, R]``, 1 - cosine of word and region; 0 where either is padding.
        plan: ``[B, R, T]`` mass that goes from region to word; 0 where either is padding.
    """

    distance: Tensor
    cost: Tensor
    plan: Tensor


def align(
    words: Tensor,
    regions: Tensor,
    word_mask: Tensor,
    region_mask: Tensor,
    *,
    beta: float = 0.5,
    iterations: int = 50,
    inner: int = 1,
) -> Transport:
    """Align words with regions, in fp32 or wider whatever autocast says.

    Args:
        words: ``[B, T, hidden]`` states.
        regions: ``[B, R, hidden]`` states.
        word_mask: ``[B, T]`` bool, True on real tokens; at least one a row.
        region_mask: ``[B, R]`` bool, True on real regions; at least one a row.
        beta: weight of the proximal term: the smaller, the nearer to the exact plan after few iterations.
        iterations: proximal steps.
        inner: Sinkhorn iterations within each.
    """
    with torch.autocast(words.device.type, enabled=False):
        wide = torch.promote_types(words.dtype, torch.float32)
        cost = _cosine_cost(words.to(wide), regions.to(wide))
        cost = cost.masked_fill(~(word_mask.unsqueeze(2) & region_mask.unsqueeze(1)), 0)
        plan = transport_plan(cost.detach(), word_mask, region_mask, beta=beta, iterations=iterations, inner=inner)
        return Transport((cost * plan.transpose(1, 2)).sum((1, 2)), cost, plan)


@torch.no_grad()
def transport_plan(
    cost: Tensor, word_mask: Tensor, region_mask: Tensor, *, beta: float = 0.5, iterations: int = 50, inner: int = 1
) -> Tensor:
    """Find the cheapest plan between uniform weights on words and uniform weights on regions.

    A proximal step solves the problem with the divergence from the last plan as regulariser: scaling the rows and
    columns of (kernel x plan) to the weights.

    Args:
        cost: ``[B, T, R]``.
        word_mask: ``[B, T]`` bool.
        region_mask: ``[B, R]`` bool.
        beta: weight of the proximal term.
        iterations: proximal steps.
        inner: scalings within each.

    Returns:
        ``[B, R, T]``; the sum over words is close to 1 / regions, that over regions is 1 / words.
    """
    word_weight, region_weight = (_uniform(mask, cost) for mask in (word_mask, region_mask))
    real = region_mask.unsqueeze(2) & word_mask.unsqueeze(1)
    kernel = (-cost.transpose(1, 2) / beta).exp() * real
    plan, word_scale = real.to(cost), word_weight
    for _ in range(iterations):
        scaled = kernel * plan
        for _ in range(inner):
            region_scale = _divided(region_weight, (scaled @ word_scale.unsqueeze(2)).squeeze(2))
            word_scale = _divided(word_weight, (region_scale.unsqueeze(1) @ scaled).squeeze(1))
        plan = region_scale.unsqueeze(2) * scaled * word_scale.unsqueeze(1)
    return plan


def _cosine_cost(words: Tensor, regions: Tensor) -> Tensor:
    """1 - cosine of every word ``[B, T, hidden]`` and region ``[B, R, hidden]``: ``[B, T, R]``."""
    unit_words, unit_regions = (F.normalize(states, dim=-1, eps=_SMALLEST_NORM) for states in (words, regions))
    return 1 - unit_words @ unit_regions.transpose(1, 2)


def _uniform(mask: Tensor, like: Tensor) -> Tensor:
    """The weight of each real position: one by their number, 0 at padding."""
    return mask.to(like) / mask.sum(1, keepdim=True)


def _divided(weight: Tensor, mass: Tensor) -> Tensor:
    """``weight / mass``, and 0 at padding, where both are 0."""
    return torch.where(weight > 0, weight / mass, torch.zeros_like(mass))
