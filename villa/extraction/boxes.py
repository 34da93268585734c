"""Geometry of detectors: anchors, box regression, non-maximum suppression and pooling of regions.

Boxes are x1, y1, x2, y2 in pixels. ``extent`` is 0 where a box ends at x2, and 1 where the pixel at x2 belongs to it,
as in caffe. torchvision's operators are used where it imports; the ones here compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

#: Largest logarithm by which a side may grow: from 16 to 1000 pixels.
MOST_GROWTH = math.log(1000 / 16)


def cell_anchors(sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """Return the anchors ``[sizes * ratios, 4]`` centred on 0, by size and then by ratio of height to width."""
    rows = []
    for size in sizes:
        for ratio in ratios:
            width = math.sqrt(size * size / ratio)
            rows.append([-width / 2, -ratio * width / 2, width / 2, ratio * width / 2])
    return torch.tensor(rows, dtype=torch.float32)


def grid_anchors(cells: Tensor, height: int, width: int, stride: int, offset: float = 0) -> Tensor:
    """Shift anchors ``[A, 4]`` to the cells of a feature map: ``[height * width * A, 4]``, by row and column."""
    sides = (torch.arange(count, device=cells.device, dtype=cells.dtype) for count in (height, width))
    ys, xs = ((side + offset) * stride for side in sides)
    y, x = torch.meshgrid(ys, xs, indexing="ij")
    shifts = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
    return (shifts + cells).reshape(-1, 4)


def regress(boxes: Tensor, deltas: Tensor, weights: Sequence[float], extent: float = 0) -> Tensor:
    """Move and scale boxes ``[N, 4]`` by deltas ``[N, K * 4]`` (dx, dy, dw, dh, times ``weights``): ``[N, K * 4]``."""
    sides = boxes[:, 2:] - boxes[:, :2] + extent
    centres = boxes[:, :2] + sides / 2
    dx, dy, dw, dh = (deltas[:, place::4] / weight for place, weight in enumerate(weights))
    shifts, growth = (dx, dy), (dw.clamp(max=MOST_GROWTH), dh.clamp(max=MOST_GROWTH))
    moved = torch.empty_like(deltas)
    for axis in (0, 1):
        centre = shifts[axis] * sides[:, axis, None] + centres[:, axis, None]
        half = growth[axis].exp() * sides[:, axis, None] / 2
        moved[:, axis::4], moved[:, axis + 2 :: 4] = centre - half, centre + half
    return moved


def clip(boxes: Tensor, height: float, width: float, extent: float = 0) -> Tensor:
    """Cut boxes ``[..., 4]`` off at the edges of an image."""
    limits = boxes.new_tensor([width, height, width, height]) - extent
    return torch.minimum(boxes.clamp(min=0), limits)


def overlaps(boxes: Tensor, others: Tensor, extent: float = 0) -> Tensor:
    """Return intersection over union of boxes ``[N, 4]`` and ``[M, 4]``: ``[N, M]``; NaN for two empty ones."""
    low = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = (high - low + extent).clamp(min=0).prod(-1)
    areas, other_areas = ((part[:, 2:] - part[:, :2] + extent).prod(-1) for part in (boxes, others))
    return common / (areas[:, None] + other_areas[None, :] - common)


def suppress(boxes: Tensor, scores: Tensor, threshold: float, limit: int | None = None, extent: float = 0) -> Tensor:
    """Return the positions of boxes that overlap no better one by more than ``threshold``, from the best to the worst.

    Args:
        boxes: ``[N, 4]``.
        scores: ``[N]``.
        threshold: intersection over union above which the worse of two boxes is left out.
        limit: most boxes to return.
        extent: see the module.
    """
    vision = _torchvision()
    if vision is not None and extent == 0:
        found: Tensor = vision.nms(boxes, scores, threshold)[:limit]
        return found
    order = scores.argsort(descending=True, stable=True)
    left = boxes[order]
    kept: list[Tensor] = []
    while len(order) and (limit is None or len(kept) < limit):
        kept.append(order[0])
        apart = ~(overlaps(left[:1], left[1:], extent)[0] > threshold)
        left, order = left[1:][apart], order[1:][apart]
    return torch.stack(kept) if kept else order


def suppress_classes(boxes: Tensor, scores: Tensor, threshold: float, extent: float = 0) -> Tensor:
    """Return, for the same boxes scored by several classes, which of them each class keeps: ``[N, C]`` bool.

    Args:
        boxes: ``[N, 4]``.
        scores: ``[N, C]``.
        threshold: as for ``suppress``.
        extent: see the module.
    """
    near = overlaps(boxes, boxes, extent) > threshold
    order = scores.argsort(dim=0, descending=True, stable=True)
    kept = torch.ones_like(scores, dtype=torch.bool).T.contiguous()
    classes = torch.arange(scores.shape[1], device=scores.device)
    for best in order:  # of every class its next box
        gone = near[best] & kept[classes, best, None]
        gone[classes, best] = False
        kept &= ~gone
    return kept.T


def pool(features: Tensor, boxes: Tensor, size: int, scale: float) -> Tensor:
    """Pool the largest values of a feature map in ``size`` x ``size`` bins of boxes (RoI pooling).

    Args:
        features: ``[D, H, W]``.
        boxes: ``[N, 4]`` in pixels of the image.
        size: bins a side.
        scale: cells of the feature map per pixel.

    Returns:
        ``[N, D, size, size]``; 0 in bins without a cell.
    """
    vision = _torchvision()
    if vision is not None:
        pooled: Tensor = vision.roi_pool(features[None], [boxes], size, scale)
        return pooled
    corners = _rounded(boxes * scale)
    left, right = _bins(corners[:, 0], corners[:, 2], size, features.shape[2])
    top, bottom = _bins(corners[:, 1], corners[:, 3], size, features.shape[1])
    pooled = features.new_zeros(len(boxes), features.shape[0], size, size)
    for number in range(len(boxes)):
        rows = _largest(features, top[number], bottom[number], dim=1)
        pooled[number] = _largest(rows, left[number], right[number], dim=2)
    return pooled


def _rounded(corners: Tensor) -> Tensor:
    """Round to whole numbers, halves away from zero, as C does."""
    return corners.sign() * (corners.abs() + 0.5).floor()


def _bins(low: Tensor, high: Tensor, size: int, cells: int) -> tuple[Tensor, Tensor]:
    """Return first cells and ends ``[N, size]`` of the bins between two edges ``[N]``, both of which belong to them."""
    steps = (high - low + 1).clamp(min=1).float() / size
    numbers = torch.arange(size, device=low.device)
    first, end = ((numbers + more) * steps[:, None] for more in (0, 1))
    return tuple((part + low[:, None]).clamp(0, cells).long() for part in (first.floor(), end.ceil()))  # type: ignore[return-value]


def _largest(features: Tensor, low: Tensor, high: Tensor, dim: int) -> Tensor:
    """Return the largest value between ``low`` and ``high`` ``[size]`` along a dimension; 0 where there is none."""
    most = max(int((high - low).max()), 1)
    places = low[:, None] + torch.arange(most, device=low.device)
    places = torch.minimum(places, (high - 1)[:, None]).clamp(0, features.shape[dim] - 1)  # repeats change no maximum
    shape = (*features.shape[:dim], *places.shape, *features.shape[dim + 1 :])
    found = features.index_select(dim, places.flatten()).view(shape).amax(dim + 1)
    empty = (high <= low).view([-1 if axis == dim else 1 for axis in range(features.dim())])
    return found.masked_fill(empty, 0)


@cache
def _torchvision() -> Any:
    """Return torchvision's operators, or None where it is missing or does not fit torch."""
    try:
        from torchvision import ops
    except Exception:  # a torchvision of another torch raises more than ImportError
        return None
    return ops
