"""Accuracy on VCR against an independent loop."""

import pytest
import torch

from villa.batch import Batch
from villa.errors import DataError
from villa.evaluation.metrics import VcrAccuracy, given_answer
from villa.facts import VcrReference
from villa.models.base import ModelOutput


def questions(count: int) -> tuple[torch.Tensor, list[VcrReference]]:
    """Scores of 20 choices each, and the right ones."""
    torch.manual_seed(3)
    answers, rationales = torch.randint(0, 4, (2, count)).tolist()
    references = [VcrReference(answer, rationale) for answer, rationale in zip(answers, rationales, strict=True)]
    return torch.randn(count, 20), references


def logits(scores: torch.Tensor) -> torch.Tensor:
    """Two columns, of which the second is the score."""
    return torch.stack((torch.randn(scores.numel()), scores.flatten()), 1)


def by_hand(scores: torch.Tensor, references: list[VcrReference]) -> dict[str, float]:
    hits = {"vcr": 0, "vcr_answer": 0, "vcr_rationale": 0}
    for row, right in zip(scores.tolist(), references, strict=True):
        assert right.answer is not None
        group = row[4 + 4 * right.answer : 8 + 4 * right.answer]
        answered = row[:4].index(max(row[:4])) == right.answer
        explained = group.index(max(group)) == right.rationale
        hits["vcr_answer"] += answered
        hits["vcr_rationale"] += explained
        hits["vcr"] += answered and explained
    return {name: count / len(references) for name, count in hits.items()}


def measured(scores: torch.Tensor, references: list[VcrReference], size: int) -> dict[str, float]:
    metric = VcrAccuracy()
    for start in range(0, len(references), size):
        part = references[start : start + size]
        metric.update(ModelOutput(logits(scores[start : start + size])), Batch(["q"] * len(part), references=part))
    return metric.compute()


@pytest.mark.parametrize("size", [1, 7, 100])
def test_20_choices_equal_the_loop_whatever_the_batches(size: int) -> None:
    """The released training script takes columns of other examples here (train_vcr_adv.py:565)."""
    scores, references = questions(100)
    assert measured(scores, references, size) == pytest.approx(by_hand(scores, references), abs=1e-12)


def test_8_choices_agree_with_the_20_that_they_are_of() -> None:
    scores, references = questions(100)
    groups = [4 + 4 * reference.answer for reference in references if reference.answer is not None]
    rationales = torch.stack([row[start : start + 4] for row, start in zip(scores, groups, strict=True)])
    assert measured(torch.cat((scores[:, :4], rationales), 1), references, 9) == measured(scores, references, 9)


def test_rationales_given_an_answer() -> None:
    scores = torch.arange(40.0).view(2, 20)
    assert given_answer(scores, torch.tensor([0, 3])).tolist() == [[4, 5, 6, 7], [36, 37, 38, 39]]
    assert given_answer(scores[:, :8], torch.tensor([0, 3])).tolist() == [[4, 5, 6, 7], [24, 25, 26, 27]]


def test_a_saved_state_goes_on() -> None:
    scores, references = questions(10)
    metric, other = VcrAccuracy(), VcrAccuracy()
    metric.update(ModelOutput(logits(scores[:4])), Batch(["q"] * 4, references=references[:4]))
    other.load_states([metric.state()])
    for each in (metric, other):
        each.update(ModelOutput(logits(scores[4:])), Batch(["q"] * 6, references=references[4:]))
    assert metric.compute() == other.compute() == pytest.approx(by_hand(scores, references), abs=1e-12)


@pytest.mark.parametrize("references", [None, [VcrReference(None, None)], [VcrReference(1, None)], ["box"]])
def test_questions_without_answers_are_refused(references: list[object] | None) -> None:
    with pytest.raises(DataError, match="metric 'vcr' needs VCR questions with answers"):
        VcrAccuracy().update(ModelOutput(torch.zeros(8, 2)), Batch(["q"], references=references))


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="no examples"):
        VcrAccuracy().compute()
