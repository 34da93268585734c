"""Scores of groups of examples and of subsets."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from villa.analysis.robustness import interval
from villa.batch import Batch
from villa.errors import DataError
from villa.evaluation.groups import Consensus, Consistency, GqaOod, GroupMetric, Subsets, consensus_scores
from villa.facts import GroupReference
from villa.models.base import ModelOutput


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


LOGITS = torch.eye(2)


def batches(size: int) -> list[tuple[ModelOutput, Batch]]:
    """Twelve examples in four groups of three, three of which are wrong, in batches of ``size``."""
    made = []
    for start in range(0, 12, size):
        rows = range(start, min(start + size, 12))
        references = [GroupReference(row % 4, ["head"] if row < 4 else ["tail", "rare"]) for row in rows]
        ids, targets = [str(row) for row in rows], torch.tensor([int(row in (0, 5, 9)) for row in rows])
        made.append((ModelOutput(LOGITS[:1].expand(len(rows), 2)), Batch(ids, targets=targets, references=references)))
    return made


def measured(metric: GroupMetric, size: int, ranks: int = 1) -> dict[str, float]:
    """What a metric says of the batches, shared by some ranks."""
    states = []
    for rank in range(ranks):
        metric.reset()
        for output, batch in batches(size)[rank::ranks]:
            metric.update(output, batch)
        states.append(metric.state())
    if ranks > 1:
        metric.load_states(states)
    return metric.compute()


def test_metrics_by_hand() -> None:
    # Groups 0 to 3 have 2, 1, 3 and 3 right answers of three.
    assert measured(Consistency(), 12) == {"consistency": 0.5}
    expected = {"consensus_1": 0.75, "consensus_2": (1 / 3 + 0 + 1 + 1) / 4, "consensus_3": 0.5}
    values = measured(Consensus(), 12)
    assert values == pytest.approx({"consensus": sum(expected.values()) / 3, **expected})
    subsets = {"": 9 / 12, "_head": 3 / 4, "_tail": 6 / 8}
    assert measured(Subsets(), 12) == pytest.approx(
        {**{f"subsets{name}": value for name, value in subsets.items()}, "subsets_rare": 6 / 8}
    )
    assert measured(GqaOod(), 12)["gqa_ood_delta"] == pytest.approx(0.0)


@pytest.mark.parametrize("kind", [Consensus, Consistency, Subsets, GqaOod])
def test_values_do_not_depend_on_batches_or_ranks(kind: type[GroupMetric]) -> None:
    metric = kind()
    values = measured(metric, 12)
    clusters = metric.clusters()
    for size, ranks in ((1, 1), (5, 2), (2, 3)):
        assert measured(metric, size, ranks) == values
        assert metric.clusters() == clusters


def test_data_without_groups_have_no_value_and_wrong_ones_are_refused() -> None:
    output, batch = batches(12)[0]
    for kind in (Consensus, Consistency, Subsets, GqaOod):
        metric = kind()
        metric.update(output, replace(batch, references=None))
        assert metric.compute() == {}
        for wrong, message in (
            (GroupReference({"a": 1}, []), r"example '0' has the group \{'a': 1\}; it must be a text or a number"),
            (GroupReference(None, "head"), r"example '0' has the subsets 'head'; they must be a list of names"),
        ):
            with pytest.raises(DataError, match=message):
                metric.update(output, replace(batch, references=[wrong, *batch.references[1:]]))
    with pytest.raises(DataError, match="no examples were evaluated"):
        Consensus().compute()


def test_soft_targets_and_texts_score_as_their_own_metrics_do() -> None:
    soft = torch.tensor([[0.3, 1.0], [0.0, 0.6]])
    references = [GroupReference("a", []), GroupReference("a", [])]
    metric = Consistency()
    for targets, right in ((soft, 0.0), (soft + torch.tensor([[0.0], [0.1]]), 1.0)):
        metric.reset()
        metric.update(
            ModelOutput(torch.tensor([[1.0, 0.0]] * 2)), Batch(["0", "1"], targets=targets, references=references)
        )
        assert metric.compute() == {"consistency": right}
    written = Batch(
        ["0", "1"],
        answer_mask=torch.tensor([[True, True], [True, False]]),
        targets=torch.tensor([1, 0, 1]),
        references=references,
    )
    metric.reset()
    metric.update(ModelOutput(LOGITS[[1, 0, 1]]), written)
    assert metric.compute() == {"consistency": 1.0}


def test_a_bootstrap_draws_whole_groups() -> None:
    """Against drawing groups by hand; groups of one size need no weights."""
    metric = Subsets()
    measured(metric, 12)
    found = metric.clusters()["subsets"]
    assert sorted(found.means) == pytest.approx([1 / 3, 2 / 3, 1, 1])
    sizes = [1, 2, 3, 10]
    draws = np.random.default_rng(0).integers(0, 4, (1000, 4))
    means = [sum(found.means[i] * sizes[i] for i in row) / sum(sizes[i] for i in row) for row in draws]
    assert interval(found.means, weights=sizes) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))))
    assert interval(found.means, weights=[3] * 4) == interval(found.means)


def test_subsets_are_a_curve_in_the_order_of_their_numbers() -> None:
    output, batch = batches(12)[0]
    names = ["tail_10", "tail_-0.7", "other", "tail_2", "tail_-0.1"]
    metric = Subsets()
    metric.update(output, replace(batch, references=[GroupReference(None, names)] * 12))
    found = [name.removeprefix("subsets_") for name in metric.compute()]
    assert found == ["subsets", "other", "tail_-0.7", "tail_-0.1", "tail_2", "tail_10"]
