"""Scores of groups of examples that belong together: rephrasings of a question, contrasts of a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import comb


def consensus_scores(groups: Iterable[Sequence[float]], k: int) -> list[float]:
    """Return the share of each group's subsets of ``k`` questions that are all answered correctly.

    Their mean is the consensus score CS(k) of VQA-Rephrasings (Shah et al., 2019). A question is answered correctly if
    its score, the VQA accuracy, is above 0. Groups with fewer than ``k`` questions have no such subset and are skipped.

    Args:
        groups: scores of the questions of each group.
        k: size of the subsets, at least 1.
    """
    correct = ((sum(score > 0 for score in scores), len(scores)) for scores in groups)
    return [comb(right, k) / comb(size, k) for right, size in correct if size >= k]
