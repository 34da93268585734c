"""Recall of images and texts by their embeddings, against counts by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from villa.batch import Batch
from villa.errors import DataError
from villa.evaluation.retrieval import PairRetrieval
from villa.models.base import ModelOutput


def scored(images: Tensor, texts: Tensor, references: list[Any] | None = None) -> PairRetrieval:
    metric = PairRetrieval()
    for start in range(0, len(images), 3):  # in batches, the last one smaller
        part = slice(start, start + 3)
        ids = [str(n) for n in range(len(images))][part]
        batch = Batch(ids, references=None if references is None else references[part])
        metric.update(ModelOutput(torch.zeros(0), embeddings=(images[part], texts[part])), batch)
    return metric


def unit(*rows: list[float]) -> Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


def test_all_right() -> None:
    vectors = torch.eye(7)
    values = scored(vectors, vectors).compute()
    assert values == dict.fromkeys(values, 1.0)
    assert list(values) == [
        "pair_retrieval",
        "texts_r1",
        "texts_r5",
        "texts_r10",
        "images_r1",
        "images_r5",
        "images_r10",
    ]


def test_counts_by_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 40, 8, generator=generator)
    values = scored(images, texts).compute()
    scores = images @ texts.T
    for name, table in (("texts", scores), ("images", scores.T)):
        for k in (1, 5, 10):
            hits = sum(int(n in table[n].topk(k).indices.tolist()) for n in range(40))
            assert values[f"{name}_r{k}"] == pytest.approx(hits / 40)


def test_an_image_with_two_texts_counts_once_and_both_are_right() -> None:
    images = unit([1.0, 0], [1, 0], [0, 1])
    texts = unit([0.2, 1], [1, 0.1], [0, 1])  # the second text of image a is nearest to it, the first to image b
    references = [{"image": "a", "text": "1"}, {"image": "a", "text": "2"}, {"image": "b", "text": "3"}]
    values = scored(images, texts, references).compute()
    assert values["texts_r1"] == 1.0
    assert values["images_r1"] == pytest.approx(2 / 3)


def test_ties_do_not_help() -> None:
    same = torch.ones(4, 2)
    assert scored(same, same).compute()["texts_r1"] == 0.0


def test_parts_of_several_ranks_make_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 9, 4, generator=generator)
    references = [{"image": str(n // 2), "text": str(n)} for n in range(9)]
    parts = [scored(images[s], texts[s], references[s]) for s in (slice(0, 5), slice(5, 9))]
    whole = PairRetrieval()
    whole.load_states([part.state() for part in parts])
    assert whole.compute() == scored(images, texts, references).compute()


def test_a_model_without_embeddings_is_refused() -> None:
    with pytest.raises(DataError, match=r"model\.task=contrastive"):
        PairRetrieval().update(ModelOutput(torch.zeros(2, 2)), Batch(["a", "b"]))
    with pytest.raises(DataError, match="no examples"):
        PairRetrieval().compute()
