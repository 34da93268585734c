"""Recall at K against the released numbers and against brute force."""

import pytest
import torch
from golden_utils import load
from torch import Tensor

from villa.batch import Batch
from villa.errors import DataError
from villa.evaluation.retrieval import RetrievalRecall, recalls
from villa.facts import RetrievalReference
from villa.models.base import ModelOutput


@pytest.mark.parametrize("kind", ["random", "perfect"])
def test_text_recalls_are_those_of_the_release(kind: str) -> None:
    """The released image recalls also count row numbers below K (utils/itm_eval.py:27) and reach 1.17."""
    golden = load("itm", "metrics")
    right = torch.tensor([golden["img_ids"].index(golden["txt2img"][text]) for text in golden["txt_ids"]])
    scores = golden["score" if kind == "random" else "perfect"]
    mine, official = recalls(scores, right), golden["official"][kind]
    for k in (1, 5, 10):
        assert mine[f"text_r{k}"] == pytest.approx(official[f"txt_r{k}"], abs=1e-12)
        assert mine[f"image_r{k}"] == brute_force(scores, right, k)[0]
        assert mine[f"image_r{k}"] <= official[f"img_r{k}"]
    if kind == "perfect":
        assert set(mine.values()) == {1.0}
        assert official["img_r10"] > 1


def brute_force(scores: Tensor, right: Tensor, k: int) -> tuple[float, float]:
    """Image and text recall by counting; of equal scores the right one counts as the worse."""
    rows = scores.tolist()
    image_hits = 0
    for row, own in zip(rows, right.tolist(), strict=True):
        better = sum(1 for column, score in enumerate(row) if column != own and score >= row[own])
        image_hits += better < k
    text_hits, images = 0, sorted(set(right.tolist()))
    for image in images:
        own = [t for t, r in enumerate(right.tolist()) if r == image]
        best = max(rows[t][image] for t in own)
        better = sum(1 for t, row in enumerate(rows) if t not in own and row[image] >= best)
        better_or_own = better + sum(1 for t in own if rows[t][image] > best)
        text_hits += better_or_own < k
    return image_hits / len(rows), text_hits / len(images)


@pytest.mark.parametrize("seed", range(20))
def test_recalls_equal_brute_force_also_with_ties_and_images_without_texts(seed: int) -> None:
    torch.manual_seed(seed)
    texts, images = int(torch.randint(1, 40, ())), int(torch.randint(1, 15, ()))
    scores = torch.randint(0, 6, (texts, images)).float()  # many ties
    right = torch.randint(0, images, (texts,))
    mine = recalls(scores, right)
    for k in (1, 5, 10):
        image, text = brute_force(scores, right, k)
        assert mine[f"image_r{k}"] == pytest.approx(image, abs=1e-12)
        assert mine[f"text_r{k}"] == pytest.approx(text, abs=1e-12)


def test_a_constant_model_finds_nothing() -> None:
    values = recalls(torch.zeros(40, 20), torch.arange(40) // 2)
    assert set(values.values()) == {0.0}


def scored(metric: RetrievalRecall, scores: Tensor, right: Tensor, chunk: int, shuffle: bool = False) -> None:
    """Give the metric the matrix in parts."""
    texts, images = scores.shape
    places = [(text, first) for first in range(0, images, chunk) for text in range(texts)]
    order = torch.randperm(len(places)).tolist() if shuffle else range(len(places))
    for place in order:
        text, first = places[place]
        names = [str(i) for i in range(first, min(first + chunk, images))]
        reference = RetrievalReference(text, first, int(right[text]), (texts, images), str(text), names)
        row = scores[text : text + 1, first : first + chunk]
        metric.update(ModelOutput(row), Batch([str(text)], references=[reference]))


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_metric_puts_parts_together_in_any_order(chunk: int) -> None:
    torch.manual_seed(0)
    scores, right = torch.randn(30, 10), torch.arange(30) // 3
    metric = RetrievalRecall()
    scored(metric, scores, right, chunk, shuffle=True)
    values = metric.compute()
    expected = recalls(scores, right)
    assert {name: value for name, value in values.items() if name != "retrieval"} == expected
    assert values["retrieval"] == pytest.approx(sum(expected.values()) / 6)


def test_the_states_of_two_processes_may_be_added() -> None:
    torch.manual_seed(0)
    scores, right = torch.randn(12, 6), torch.arange(12) // 2
    halves = [RetrievalRecall(), RetrievalRecall()]
    for number, metric in enumerate(halves):
        for text in range(12):
            reference = RetrievalReference(text, 3 * number, int(right[text]), (12, 6), str(text), ["a", "b", "c"])
            row = scores[text : text + 1, 3 * number : 3 * number + 3]
            metric.update(ModelOutput(row), Batch([str(text)], references=[reference]))
    whole = RetrievalRecall()
    scored(whole, scores, right, 6)
    states = [half.state() for half in halves]
    states[1][:12] = 0  # each text was seen by both here; with texts shared out they are seen once
    halves[0].load_states(states)
    assert halves[0].compute() == whole.compute()


def test_nothing_scored_and_other_data_are_refused() -> None:
    metric = RetrievalRecall()
    with pytest.raises(DataError, match="no examples"):
        metric.compute()
    with pytest.raises(DataError, match="use the data set 'retrieval'"):
        metric.update(ModelOutput(torch.zeros(1, 2)), Batch(["a"]))
