"""Checks of regions from any source: normalised boxes, finite features, confidences in [0, 1]."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

_Item = TypeVar("_Item")
Floats = npt.NDArray[np.floating[Any]]

#: Allowed numbers of columns: x1, y1, x2, y2; with width and height; with the area.
WIDTHS = (4, 6, 7)
#: Share of the image size by which a box may stick out, for rounding and clipping by one pixel.
SLACK = 0.01
#: Tolerance of x2 below x1: float16 has steps of 2^-11 near 1, and both corners are rounded.
_ROUNDING = 2**-10
#: Tolerance of the stored width against x2 - x1: rounding, and one pixel if the width includes both edges.
_SIZE_SLACK = 0.02
#: Smallest side, below the smallest positive float16, so that no side that float16 can represent counts as 0.
_SMALLEST = 2**-25
#: Number of images that are read when a split is opened.
SAMPLE = 16


def check_boxes(boxes: Floats, *, allow_empty: bool = False) -> None:
    """Refuse boxes that are not x1, y1, x2, y2 (and width, height, area) divided by the image's width and height.

    Args:
        boxes: ``[R, 4 | 6 | 7]`` float32.
        allow_empty: accept boxes without area.

    Raises:
        ValueError: naming the first invalid box, and why it is invalid.
    """
    projection, least = _conditions(boxes.shape[1], allow_empty)
    # This runs for every image that is read, hence the few numpy calls. NaN compares as false.
    with np.errstate(invalid="ignore", over="ignore"):
        held = np.dot(boxes if boxes.shape[1] < 7 else boxes[:, :6], projection) >= least
        if boxes.shape[1] == 7:
            held &= np.abs(boxes[:, 6:] - boxes[:, 4:5] * boxes[:, 5:6]) <= 2 * _SIZE_SLACK
    if 0 in held.tobytes():
        number = int(np.argmin(held.all(1)))
        raise ValueError(f"box {number + 1} of {len(boxes)}, {_shown(boxes[number])}, {_fault(boxes[number])}")


def check_features(features: Floats | Tensor) -> None:
    """Refuse region features ``[R, D]`` with NaN or infinite values.

    Raises:
        ValueError: naming the first such region.
    """
    finite = np.isfinite(features) if isinstance(features, np.ndarray) else features.isfinite().numpy()
    if not finite.all():
        raise ValueError(f"the features of box {np.argmin(finite.all(1)) + 1} hold NaN or infinite values")


def check_confidences(confidences: Floats) -> None:
    """Refuse confidences ``[R]`` outside of [0, 1].

    Raises:
        ValueError: naming the first such box.
    """
    held = (confidences >= -SLACK) & (confidences <= 1 + SLACK)
    if not held.all():
        number = int(np.argmin(held))
        raise ValueError(f"the confidence of box {number + 1} is {confidences[number]:g}; it must be within [0, 1]")


def sampled(items: Sequence[_Item]) -> list[_Item]:
    """Return a random sample of items, the same in every run, to check when data are opened."""
    chosen = random.Random(0).sample(range(len(items)), min(SAMPLE, len(items)))  # noqa: S311
    return [items[place] for place in sorted(chosen)]


@cache
def _conditions(width: int, allow_empty: bool) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return linear functions of a box ``[4 | 6, N]`` and the minimum ``[N]`` of each."""
    x1, y1, x2, y2, w, h = np.eye(6, dtype=np.float32)
    smallest = -_ROUNDING if allow_empty else _SMALLEST
    conditions = [(x1, -SLACK), (y1, -SLACK), (-x2, -1 - SLACK), (-y2, -1 - SLACK)]
    if width == 4:
        conditions += [(x2 - x1, smallest), (y2 - y1, smallest)]
    else:  # stored sides are more exact than differences of rounded corners
        conditions += [(x2 - x1, -_ROUNDING), (y2 - y1, -_ROUNDING), (w, smallest), (h, smallest)]
        for side, difference in ((w, x2 - x1), (h, y2 - y1)):
            conditions += [(side - difference, -_SIZE_SLACK), (difference - side, -_SIZE_SLACK)]
    projection = np.stack([function for function, _ in conditions], 1)[: min(width, 6)]
    return np.ascontiguousarray(projection), np.array([least for _, least in conditions], np.float32)


def _shown(box: Floats) -> str:
    return "[" + ", ".join(f"{number:.4g}" for number in box.tolist()) + "]"


def _fault(box: Floats) -> str:
    """Describe what is wrong with an invalid box."""
    x1, y1, x2, y2, *sides = box.tolist()
    w, h = sides[:2] or (x2 - x1, y2 - y1)
    if not np.isfinite(box).all():
        return "holds NaN or infinite values"
    if min(x1, y1) < -SLACK or max(x2, y2) > 1 + SLACK:
        return "is not within [0, 1]; divide them by the image's width and height, and cut off what sticks out"
    if x2 - x1 < -_ROUNDING or y2 - y1 < -_ROUNDING:
        return "has x2 < x1 or y2 < y1; give x1, y1, x2, y2, not x, y, width, height"
    if abs(w - (x2 - x1)) > _SIZE_SLACK or abs(h - (y2 - y1)) > _SIZE_SLACK:
        return "has a width or height other than x2 - x1, y2 - y1; give x1, y1, x2, y2, width, height"
    if min(w, h) < _SMALLEST:
        return (
            "is empty: its width or height is 0; leave it out, or allow it (dataset.allow_empty_boxes=true, "
            "make_image_db --allow-empty-boxes)"
        )
    return "has an area other than width x height; give x1, y1, x2, y2, width, height, area"
