"""Shares of the training examples, to see what a method does with less data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

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
    if fraction == 1:
        return items
    order = np.random.default_rng(derive_seed("fraction", seed)).permutation(len(items))
    return [items[index] for index in sorted(order[: max(1, round(fraction * len(items)))].tolist())]
