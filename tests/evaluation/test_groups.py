"""Scores of groups of examples: consensus."""

from __future__ import annotations

import itertools
import random

import pytest

from villa.evaluation.groups import consensus_scores


def test_consensus_is_the_share_of_subsets_answered_correctly_throughout() -> None:
    draw = random.Random(0)
    groups = [[draw.choice((0.0, 0.0, 0.3, 1.0)) for _ in range(draw.randint(1, 6))] for _ in range(50)]
    for k in range(1, 7):
        expected = [
            sum(all(score > 0 for score in subset) for subset in subsets) / len(subsets)
            for scores in groups
            if (subsets := list(itertools.combinations(scores, k)))
        ]
        assert consensus_scores(groups, k) == pytest.approx(expected)


def test_consensus_of_three_correct_answers_out_of_four() -> None:
    assert [consensus_scores([[1, 0.3, 0, 0.6]], k) for k in (1, 2, 3, 4, 5)] == [[0.75], [0.5], [0.25], [0.0], []]
