"""Intervals that hold as often as they say, and differences that are seen as often as they say."""

import numpy as np
import pytest

from villa.analysis.differences import Scores, difference
from villa.errors import DataError


def scores(table: np.ndarray) -> Scores:
    return {seed: {str(i): float(value) for i, value in enumerate(row)} for seed, row in enumerate(table, 1)}


def drawn(random: np.random.Generator, shift: float, seeds: int = 3, examples: int = 60) -> tuple[Scores, Scores]:
    """Two methods whose true difference is ``shift``; it varies by seed (0.1), by example (0.3) and otherwise (0.2)."""
    base = random.normal(size=(seeds, examples))
    by_seed, by_example = random.normal(0, 0.1, (seeds, 1)), random.normal(0, 0.3, (1, examples))
    return scores(base), scores(base + shift + by_seed + by_example + random.normal(0, 0.2, base.shape))


def test_a_method_does_not_differ_from_itself() -> None:
    base, _ = drawn(np.random.default_rng(0), 0.0)
    found = difference(base, base)
    assert (found.mean, found.low, found.high, found.detectable) == (0, 0, 0, 0)
    assert not found.shown
    assert (found.seeds, found.examples) == (3, 60)


def test_the_interval_of_one_seed_is_that_of_its_examples() -> None:
    random = np.random.default_rng(1)
    base, other = drawn(random, 0.5, seeds=1, examples=400)
    found = difference(base, other)
    each = np.array([other[1][id_] - base[1][id_] for id_ in base[1]])
    error = each.std() / 20
    assert found.mean == pytest.approx(each.mean())
    assert (found.low, found.high) == pytest.approx((each.mean() - 1.96 * error, each.mean() + 1.96 * error), abs=0.005)
    assert found.detectable == pytest.approx(2.8 * error, rel=0.01)


def test_the_interval_of_few_seeds_is_that_of_student() -> None:
    """Without differences between examples it is exactly known: the 97.5 % quantile of t with two degrees is 4.303."""
    base = scores(np.zeros((3, 50)))
    found = difference(base, scores(np.repeat([[0.1], [0.3], [0.8]], 50, axis=1)))
    half = 4.303 * np.std([0.1, 0.3, 0.8], ddof=1) / 3**0.5
    assert (found.low, found.high) == pytest.approx((0.4 - half, 0.4 + half), rel=0.03)


def test_intervals_cover_the_truth_and_detectable_differences_are_seen() -> None:
    """Of three seeds: a bootstrap of the seeds would cover it in under nine of ten cases."""
    random = np.random.default_rng(2)
    found = [difference(*drawn(random, 0.2)) for _ in range(150)]
    assert np.mean([one.low <= 0.2 <= one.high for one in found]) >= 0.93
    size = float(np.median([one.detectable for one in found]))
    assert 0.7 <= np.mean([difference(*drawn(random, size)).shown for _ in range(150)]) <= 0.95
    assert np.mean([difference(*drawn(random, 0.0)).shown for _ in range(150)]) <= 0.07


def test_other_seeds_or_examples_are_refused() -> None:
    base, _ = drawn(np.random.default_rng(3), 0.0)
    with pytest.raises(DataError, match="seeds"):
        difference(base, {1: base[1]})
    with pytest.raises(DataError, match="other examples"):
        difference(base, {seed: dict(list(own.items())[1:]) for seed, own in base.items()})
