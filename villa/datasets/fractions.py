"""Shares of the training examples, to see what a method does with less data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from villa.engine.rng import derive_seed
from villa.errors import ConfigError

T = TypeVar("T")


def check_fraction(fraction: float) -> None:
    """Refuse a share that is none.

    Raises:
        ConfigError: it is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"dataset.fraction={fraction} is not allowed; give a share in (0, 1]")


def share(items: Sequence[T], fraction: float, seed: int) -> Sequence[T]:
    """Return a random share of the items, at least one, in their order; a smaller share is part of a larger one.

    Args:
        items: all of them.
        fraction: the share, in (0, 1].
        seed: of the choice.
    """
    return items if fraction == 1 else [items[row] for row in share_rows(len(items), fraction, seed).tolist()]


def share_rows(count: int, fraction: float, seed: int) -> npt.NDArray[np.int64]:
    """Return the places of such a share of ``count`` items, ascending; see ``share``."""
    if fraction == 1:
        return np.arange(count)
    order = np.random.default_rng(derive_seed("fraction", seed)).permutation(count)
    return np.sort(order[: max(1, round(fraction * count))])
