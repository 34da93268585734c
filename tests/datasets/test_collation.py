from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from villa.datasets.base import Example
from villa.datasets.collation import collate, placed, reading
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


#: Stored features of images of different sizes, as a mapped file holds them.
STORED = [np.arange(1, 1 + 3 * rows, dtype=np.float16).reshape(rows, 3) / 7 for rows in (2, 5, 1, 4)]
for stored in STORED:
    stored.flags.writeable = False


def read(order: list[int], *, images: int = 1) -> list[Example]:
    """Read examples of one or several images each."""
    values = [placed(STORED[number]) for number in order]
    boxes = [torch.full((len(features), 4), 0.5) for features in values]
    if images == 1:
        return [Example("a", torch.ones(2), None, *regions) for regions in zip(values, boxes, strict=True)]
    starts = range(0, len(values), images)
    cut = [tuple(tuple(rows[start : start + images]) for rows in (values, boxes)) for start in starts]
    return [Example("a", torch.ones(2), None, *regions) for regions in cut]


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    assert one is not None
    assert other is not None
    return one.dtype == other.dtype and one.is_contiguous() and torch.equal(one, other)


@pytest.mark.parametrize("images", [1, 2])
def test_features_of_known_sizes_are_read_straight_into_the_batch(images: int) -> None:
    order = [1, 0, 3, 3]
    plain = collate(read(order, images=images))
    with reading([len(STORED[number]) for number in order]):
        examples = read(order, images=images)
        batch = collate(examples)
    assert same(batch.features, plain.features)
    assert same(batch.boxes, plain.boxes)
    assert batch.region_mask is not None
    assert torch.equal(batch.region_mask, plain.region_mask)
    first = examples[0].features if images == 1 else examples[0].features[0]
    assert isinstance(first, torch.Tensor)
    assert first.data_ptr() == batch.features.data_ptr()


@pytest.mark.parametrize(
    ("planned", "order"),
    [([5, 2, 4], [1, 2, 3]), ([5, 5], [1, 0]), ([2, 5, 4], [0, 1, 3, 2]), ([2, 5, 4], [0, 1]), ([9], [1])],
)
def test_features_of_other_sizes_than_expected_are_copied(planned: list[int], order: list[int]) -> None:
    plain = collate(read(order))
    with reading(planned):
        batch = collate(read(order))
    assert same(batch.features, plain.features)


def test_examples_that_change_or_trade_their_features_keep_them() -> None:
    changes = {
        "reversed": lambda examples: examples[::-1],
        "repeated": lambda examples: [examples[1], examples[1], examples[0]],
        "scaled": lambda examples: [replace(example, features=example.features * 2) for example in examples],
        "turned": lambda examples: [replace(example, features=example.features.flip(0)) for example in examples],
        "as bits": lambda examples: [replace(e, features=e.features.float().view(torch.int32)) for e in examples],
    }
    for name, change in changes.items():
        plain = collate(change(read([3, 3, 3])))
        with reading([4, 4, 4]):
            batch = collate(change(read([3, 3, 3])))
        assert same(batch.features, plain.features), name


def test_an_error_leaves_no_batch_half_read() -> None:
    def fail() -> None:
        with reading([2, 5]):
            placed(STORED[0])
            raise DataError("the second image is damaged")

    with pytest.raises(DataError):
        fail()
    assert placed(STORED[0]).dtype == torch.float16
    with reading([5]):
        assert placed(STORED[1]).dtype == torch.float32


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_features_are_read_from_wherever_they_lie(dtype: type[np.floating[Any]]) -> None:
    values = (np.arange(60) / 7).astype(dtype).reshape(20, 3)
    unaligned = np.frombuffer(b"\0" + values.tobytes(), dtype, offset=1).reshape(20, 3)
    for features in (values, unaligned, np.asfortranarray(values), values[::2], values[[5, 3, 9]]):
        with reading([len(features), len(features)]):
            images = [placed(features), placed(features)]
            batch = collate([Example("a", torch.ones(1), None, image, torch.ones(len(image), 4)) for image in images])
        assert batch.features is not None
        assert batch.features.data_ptr() == images[0].data_ptr()
        assert np.array_equal(batch.features.numpy(), np.stack([features, features]).astype(np.float32))
