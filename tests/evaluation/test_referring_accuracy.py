"""Accuracy of referring expressions, and the intersection over union that decides it."""

import pytest
import torch
from golden_utils import load

from villa.batch import Batch
from villa.errors import DataError
from villa.evaluation.metrics import ReferringAccuracy, box_iou
from villa.facts import Box, RegionReference
from villa.models.base import ModelOutput


def test_iou_is_that_of_the_release() -> None:
    for first, second, expected in load("re", "batch")["iou"]:
        assert box_iou(tuple(first), tuple(second)) == pytest.approx(expected, abs=1e-12)
        assert box_iou(tuple(second), tuple(first)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_iou_of_whole_pixels_counts_pixels(seed: int) -> None:
    torch.manual_seed(seed)
    first, second = (tuple(torch.randint(1, 12, (4,)).tolist()) for _ in range(2))

    def pixels(box: tuple[int, ...]) -> set[tuple[int, int]]:
        return {(x, y) for x in range(box[0], box[0] + box[2]) for y in range(box[1], box[1] + box[3])}

    shared, whole = len(pixels(first) & pixels(second)), len(pixels(first) | pixels(second))
    columns = len({x for x, _ in pixels(first) & pixels(second)})
    rows = len({y for _, y in pixels(first) & pixels(second)})
    if columns == 1 or rows == 1:  # the release counts a strip of one pixel as none
        shared, whole = 0, len(pixels(first)) + len(pixels(second))
    assert box_iou(first, second) == pytest.approx(shared / whole)  # type: ignore[arg-type]


MEANT: Box = (0.0, 0.0, 10.0, 10.0)


@pytest.mark.parametrize(
    ("box", "right"), [((0, 0, 10, 10), 1), ((0, 0, 10, 5), 0), ((0, 0, 10, 5.1), 1), ((50, 0, 9, 9), 0)]
)
def test_a_hit_overlaps_by_more_than_half(box: Box, right: int) -> None:
    metric = ReferringAccuracy()
    reference = RegionReference(MEANT, [(70, 70, 1, 1), box])
    metric.update(ModelOutput(torch.tensor([[0.0, 1.0, -1e4]])), Batch(["a"], references=[reference]))
    assert metric.compute() == {"referring": right}


def test_the_share_of_hits_is_over_all_expressions() -> None:
    metric = ReferringAccuracy()
    reference = RegionReference(MEANT, [MEANT, (70, 70, 1, 1)])
    for logits in ([[1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]):
        output = ModelOutput(torch.tensor(logits))
        metric.update(output, Batch(["a"] * len(logits), references=[reference] * len(logits)))
    assert metric.compute() == {"referring": 0.5}


@pytest.mark.parametrize("references", [None, [RegionReference(None, [MEANT])], ["box"]])
def test_expressions_without_the_box_meant_are_refused(references: list[object] | None) -> None:
    with pytest.raises(DataError, match="metric 'referring' needs expressions with the box meant"):
        ReferringAccuracy().update(ModelOutput(torch.zeros(1, 1)), Batch(["a"], references=references))
