"""Suppression and pooling against plain loops, and against torchvision where there is one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from villa.extraction import boxes as geometry


def some_boxes(count: int, seed: int = 0, side: float = 100) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=random) * side
    return torch.cat([corners, corners + torch.rand(count, 2, generator=random) * side / 2], -1)


def overlap(one: list[float], other: list[float], extent: float) -> float:
    width, height = (max(min(one[k + 2], other[k + 2]) - max(one[k], other[k]) + extent, 0) for k in (0, 1))
    areas = [(box[2] - box[0] + extent) * (box[3] - box[1] + extent) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


def suppressed(boxes: Tensor, scores: Tensor, threshold: float, extent: float) -> list[int]:
    kept: list[int] = []
    for place in sorted(range(len(boxes)), key=lambda place: (-float(scores[place]), place)):
        box = boxes[place].tolist()
        if all(overlap(box, boxes[better].tolist(), extent) <= threshold for better in kept):
            kept.append(place)
    return kept


@pytest.mark.parametrize("extent", [0, 1])
def test_suppression_keeps_what_overlaps_nothing_better(extent: int) -> None:
    boxes = some_boxes(80)
    scores = torch.rand(80, 7, generator=torch.Generator().manual_seed(1)).round(decimals=1)  # some are equal
    for threshold in (0.1, 0.3, 0.7):
        expected = suppressed(boxes, scores[:, 0], threshold, extent)
        assert geometry.suppress(boxes, scores[:, 0], threshold, extent=extent).tolist() == expected
        assert geometry.suppress(boxes, scores[:, 0], threshold, 5, extent).tolist() == expected[:5]
        kept = geometry.suppress_classes(boxes, scores, threshold, extent)
        for number, column in enumerate(scores.T):
            assert kept[:, number].nonzero().flatten().tolist() == sorted(suppressed(boxes, column, threshold, extent))
    assert geometry.suppress(boxes[:0], scores[:0, 0], 0.5).tolist() == []


def test_a_threshold_of_one_keeps_all() -> None:
    boxes = some_boxes(5)[[0, 0, 1, 2, 2]]
    assert sorted(geometry.suppress(boxes, torch.arange(5.0), 1.0).tolist()) == [*range(5)]


def pooled(features: Tensor, box: list[float], size: int, scale: float) -> Tensor:
    """The largest value in each bin, cell by cell."""
    left, top, right, bottom = (math.floor(edge * scale + 0.5) for edge in box)
    found = torch.zeros(features.shape[0], size, size)
    steps = [torch.tensor(max(high - low + 1, 1)).float() / size for low, high in ((top, bottom), (left, right))]

    def cells(number: int, step: Tensor, first: int, end: int) -> range:
        low, high = math.floor(number * step), math.ceil((number + 1) * step)
        return range(min(max(low + first, 0), end), min(max(high + first, 0), end))

    for row in range(size):
        for column in range(size):
            inside = [
                features[:, y, x]
                for y in cells(row, steps[0], top, features.shape[1])
                for x in cells(column, steps[1], left, features.shape[2])
            ]
            if inside:
                found[:, row, column] = torch.stack(inside).amax(0)
    return found


def test_pooling_takes_the_largest_value_of_each_bin() -> None:
    features = torch.randn(3, 9, 12, generator=torch.Generator().manual_seed(0))
    boxes = torch.cat(
        [some_boxes(12, side=150), torch.tensor([[0, 0, 192, 144.0], [8, 8, 8, 8], [150, 100, 400, 400]])]
    )
    for size in (7, 14):
        found = geometry.pool(features, boxes, size, 1 / 16)
        for box, bins in zip(boxes.tolist(), found, strict=True):
            assert torch.equal(bins, pooled(features, box, size, 1 / 16))


def test_torchvision_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    if geometry._torchvision() is None:
        pytest.skip("torchvision does not import here")
    features, boxes = torch.randn(3, 20, 30), some_boxes(200, side=300)
    scores = torch.rand(200)
    theirs = geometry.pool(features, boxes, 14, 1 / 16), geometry.suppress(boxes, scores, 0.3)
    monkeypatch.setattr(geometry, "_torchvision", lambda: None)
    assert torch.equal(theirs[0], geometry.pool(features, boxes, 14, 1 / 16))
    assert torch.equal(theirs[1], geometry.suppress(boxes, scores, 0.3))


@pytest.mark.parametrize("extent", [0, 1])
def test_regression_moves_and_scales(extent: int) -> None:
    box, deltas = torch.tensor([[10.0, 20, 30, 60]]), torch.tensor([[0, 0, 0, 0, 1.0, -2, math.log(2), 10]])
    same, moved = geometry.regress(box, deltas, (1, 2, 1, 1), extent).view(2, 4).tolist()
    width, height = 20 + extent, 40 + extent
    assert same == [10, 20, 10 + width, 20 + height]
    x, y = 10 + width / 2 + width, 20 + height / 2 - height  # the second delta is halved by its weight
    half = height * 1000 / 16 / 2  # growth is limited
    assert moved == pytest.approx([x - width, y - half, x + width, y + half])
    assert geometry.clip(torch.tensor([[-5.0, 3, 50, 90]]), 40, 45, extent).tolist() == [
        [0, 3, 45 - extent, 40 - extent]
    ]


def test_anchors_lie_on_a_grid_by_row_column_and_shape() -> None:
    cells = geometry.cell_anchors((16, 32), (0.5, 1, 2))
    assert (cells[:, 2:] - cells[:, :2]).prod(-1).tolist() == pytest.approx([256] * 3 + [1024] * 3)
    assert ((cells[:, 3] - cells[:, 1]) / (cells[:, 2] - cells[:, 0])).tolist() == pytest.approx([0.5, 1, 2] * 2)
    anchors = geometry.grid_anchors(cells, 2, 3, 16).view(2, 3, 6, 4)
    assert torch.equal(anchors[1, 2], cells + torch.tensor([32, 16, 32, 16]))
