from __future__ import annotations

from typing import Any

import pytest
import torch

from villa.datasets.base import Example
from villa.datasets.collation import collate
from villa.errors import DataError


def example(name: str, tokens: int, regions: int = 0, **fields: Any) -> Example:
    if regions:
        fields |= {"features": torch.full((regions, 3), 0.5, dtype=torch.float16), "boxes": torch.rand(regions, 4)}
    return Example(name, torch.arange(1, tokens + 1), **fields)


def test_text_and_regions_are_padded_on_the_right() -> None:
    first, second = example("a", 2, 3, target=1), example("b", 4, 1, target=0)
    batch = collate([first, second])
    assert batch.ids == ["a", "b"]
    assert batch.input_ids is not None
    assert batch.input_ids.tolist() == [[1, 2, 0, 0], [1, 2, 3, 4]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.features is not None
    assert batch.features.dtype == torch.float32
    assert batch.features[:, :, 0].tolist() == [[0.5, 0.5, 0.5], [0.5, 0, 0]]
    assert batch.region_mask is not None
    assert batch.region_mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.boxes is not None
    assert first.boxes is not None
    assert batch.boxes[0].equal(first.boxes)
    assert batch.targets is not None
    assert batch.targets.tolist() == [1, 0]
    assert batch.targets.dtype == torch.int64


def test_choices_and_images_keep_their_dimension() -> None:
    def two_rows(name: str, tokens: tuple[int, int], regions: tuple[int, int], target: list[int]) -> Example:
        texts = tuple(torch.arange(1, count + 1) for count in tokens)
        types = tuple(torch.ones_like(text) for text in texts)
        features = tuple(torch.zeros(count, 5, dtype=torch.float16) for count in regions)
        boxes = tuple(torch.rand(count, 6) for count in regions)
        return Example(name, texts, types, features, boxes, torch.tensor(target), reference=name.upper())

    batch = collate([two_rows("a", (3, 2), (3, 1), [1, 0]), two_rows("b", (1, 1), (1, 1), [0, 1])])
    assert batch.input_ids is not None
    assert batch.input_ids.tolist() == [[[1, 2, 3], [1, 2, 0]], [[1, 0, 0], [1, 0, 0]]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.sum(-1).tolist() == [[3, 2], [1, 1]]
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.sum(-1).tolist() == [[3, 2], [1, 1]]
    assert batch.features is not None
    assert batch.features.shape == (2, 2, 3, 5)
    assert batch.region_mask is not None  # features that are all zero are regions all the same
    assert batch.region_mask.sum(-1).tolist() == [[3, 1], [1, 1]]
    assert batch.boxes is not None
    assert batch.boxes.shape == (2, 2, 3, 6)
    assert not batch.boxes[1, :, 1:].any()
    assert batch.targets is not None
    assert batch.targets.tolist() == [[1, 0], [0, 1]]
    assert batch.references == ["A", "B"]


def test_text_only_and_soft_targets() -> None:
    batch = collate([example("a", 2, target=torch.tensor([0.3, 1.0])), example("b", 2, target=torch.zeros(2))])
    assert batch.features is batch.boxes is batch.region_mask is batch.token_type_ids is None
    assert batch.targets is not None
    assert batch.targets.tolist() == [[pytest.approx(0.3), 1.0], [0.0, 0.0]]
    assert collate([example("a", 2)]).targets is None


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([example("a", 2, 1), example("b", 2)], r"with and without features \(without: 'b'\)"),
        ([example("a", 2, target=1), example("b", 2)], r"with and without targets"),
        ([example("a", 2, target=1), example("b", 2, target=torch.zeros(3))], "mixes class and soft targets"),
        ([example("a", 2), Example("b", (torch.ones(2), torch.ones(2)))], "examples of .* rows"),
        ([Example("a", (torch.ones(2),) * 3), Example("b", (torch.ones(2),) * 2)], r"of (3 and 2|2 and 3) rows"),
        (
            [Example("a", torch.ones(2), features=torch.ones(1, w), boxes=torch.ones(1, 4)) for w in (5, 6)],
            r"rows of width (\[5\] and \[6\]|\[6\] and \[5\])",
        ),
    ],
)
def test_mixed_forms_are_refused(examples: list[Example], message: str) -> None:
    with pytest.raises(DataError, match=message):
        collate(examples)
