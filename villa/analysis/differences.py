"""Paired differences of two methods over seeds and examples, and how large one would have to be to be seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from villa.errors import DataError

#: Scores of every example by its id, for each seed.
Scores = Mapping[int, Mapping[str, float]]

_DRAWS = 2000
#: Draws of Student's t for each resample: of few seeds its tails are long, and with few draws the ends are luck.
_STUDENT = 100
#: Most values that a bootstrap draws at once, so that its memory does not grow with the examples.
_AT_ONCE = 1 << 20
#: Two-sided level of intervals, and the chance with which a ``detectable`` difference is seen.
_LEVEL, _POWER = 0.05, 0.8


@dataclass(frozen=True)
class Difference:
    """The mean difference of two methods.

    Attributes:
        mean: of the second from the first, over seeds and examples.
        low: lower end of the 95 % interval.
        high: upper end.
        detectable: the difference that such a comparison would show in four of five cases.
        seeds: number of seeds.
        examples: number of examples.
    """

    mean: float
    low: float
    high: float
    detectable: float
    seeds: int
    examples: int

    @property
    def shown(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def difference(base: Scores, other: Scores) -> Difference:
    """Compare two methods on the same seeds and examples.

    Examples are resampled (the same ones for both methods and all seeds). Seeds, of which there are few, are not: their
    mean is drawn from Student's t distribution, as a bootstrap of three values would be too narrow. With a single seed
    the interval is that of its examples alone.

    Raises:
        DataError: seeds or examples differ.
    """
    values = _paired(base, other)
    seeds, examples = values.shape
    random = np.random.default_rng(0)
    drawn = _resampled(values, random)
    means = drawn.mean(0)
    if seeds > 1:
        student = random.standard_t(seeds - 1, (len(means), _STUDENT))
        means = means[:, None] + np.concatenate([student, -student], 1) * drawn.std(0, ddof=1)[:, None] / seeds**0.5
    low, high = np.quantile(means, (_LEVEL / 2, 1 - _LEVEL / 2))
    return Difference(float(values.mean()), float(low), float(high), _detectable(values), seeds, examples)


def _paired(base: Scores, other: Scores) -> npt.NDArray[np.float64]:
    """Return differences ``[seeds, examples]``."""
    ids = list(next(iter(base.values()), {}))
    if not ids or base.keys() != other.keys():
        raise DataError(f"methods with seeds {sorted(base)} and {sorted(other)} cannot be compared: take the same ones")
    if any(scores.keys() != set(ids) for scores in (*base.values(), *other.values())):
        raise DataError("methods that were scored on other examples cannot be compared: score both on the same split")
    return np.array([[other[seed][id_] - base[seed][id_] for id_ in ids] for seed in base], np.float64)


def resamples(
    count: int, draws: int, *, width: int = 1, seed: int | np.random.Generator = 0
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield what a bootstrap draws of some items, ``draws`` rows ``[count]`` in all, in parts that fit into memory.

    Args:
        count: number of items.
        draws: number of resamples.
        width: values that are gathered of each item.
        seed: seed, or generator, of the draws.
    """
    generator = np.random.default_rng(seed)
    size = max(1, _AT_ONCE // (count * width))
    for start in range(0, draws, size):
        yield generator.integers(0, count, (min(size, draws - start), count))


def _resampled(values: npt.NDArray[np.float64], random: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return means over resampled examples, ``[seeds, draws]``."""
    seeds, count = values.shape
    picked = resamples(count, _DRAWS, width=seeds, seed=random)
    return np.concatenate([values[:, picks].mean(2) for picks in picked], axis=1)


def _detectable(values: npt.NDArray[np.float64]) -> float:
    seeds, examples = values.shape
    variance = values.mean(0).var() / examples
    if seeds > 1:
        variance += values.mean(1).var(ddof=1) / seeds
    return float(sum(_quantile(1 - tail, seeds - 1) for tail in (_LEVEL / 2, 1 - _POWER)) * variance**0.5)


@cache
def _quantile(share: float, freedom: int) -> float:
    """Return a quantile of Student's t distribution, or of the normal one without degrees of freedom."""
    random, count = np.random.default_rng(1), 400_000
    draws = random.standard_t(freedom, count) if freedom else random.standard_normal(count)
    return float(np.quantile(np.concatenate([draws, -draws]), share))
