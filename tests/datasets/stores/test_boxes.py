"""What boxes, features and confidences must be, in every store of regions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from named_stores import read_image

from villa.datasets.boxes import check_boxes, check_confidences, sampled
from villa.datasets.lxmert.features import TsvFile, TsvStore, read_regions, write_line
from villa.datasets.own.files import FileStore
from villa.datasets.stores import Source
from villa.datasets.uniter.box_selection import BoxSelection
from villa.datasets.uniter.image_lmdb import ImageStore
from villa.datasets.uniter.writers import ImageDatabaseWriter
from villa.errors import DataError

WIDTH, HEIGHT = 640, 480


def corners(rows: int = 6) -> np.ndarray:
    """Boxes ``[R, 4]`` x1, y1, x2, y2 with area."""
    random = np.random.default_rng(rows)
    low, size = random.random((rows, 2)) * 0.5, 0.01 + random.random((rows, 2)) * 0.4
    return np.concatenate([low, low + size], 1).astype(np.float32)


def sides(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes, boxes[:, 2:] - boxes[:, :2]], 1)


def changed(number: int, box: list[float]) -> np.ndarray:
    boxes = corners()
    boxes[number] = box
    return boxes


def xywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("rows", [1, 6, 100])
def test_boxes_that_are_right_pass_in_every_width_and_precision(kind: type, rows: int) -> None:
    six = sides(corners(rows)).astype(kind).astype(np.float32)
    area = (six[:, 4:5] * six[:, 5:6]).astype(kind)
    for boxes in (six[:, :4], six, np.concatenate([six, area], 1), np.asfortranarray(six)):
        check_boxes(boxes)


@pytest.mark.parametrize(
    "box",
    [[0, 0, 1, 1], [0, 0, 1.004, 1], [-0.004, 0, 1, 1], [0.999, 0.998, 1, 1], [0.5, 0.5, 0.5002, 0.5002]],
)
def test_the_whole_image_and_what_rounding_makes_of_its_edges_pass(box: list[float]) -> None:
    check_boxes(changed(2, box))
    check_boxes(sides(changed(2, box)))


def test_a_side_that_float16_rounds_off_the_corners_but_keeps_passes() -> None:
    thin = np.array([[0.9, 0.1, 0.90005, 0.3]], np.float32)
    stored = sides(thin).astype(np.float16).astype(np.float32)
    assert stored[0, 0] == stored[0, 2]
    check_boxes(stored)


BAD = [
    (corners() * [[WIDTH, HEIGHT, WIDTH, HEIGHT]], r"box 1 of 6.*not within \[0, 1\]; divide"),
    (xywh(changed(0, [0.6, 0.1, 0.9, 0.4])), r"box 1 of 6, \[0.6, 0.1, 0.3, 0.3.*x2 < x1 or y2 < y1"),
    (changed(3, [0.6, 0.1, 0.4, 0.4]), "box 4 of 6.*x2 < x1"),
    (changed(3, [0.1, 0.6, 0.4, 0.4]), "box 4 of 6.*y2 < y1"),
    (changed(1, [-0.2, 0.1, 0.4, 0.4]), r"box 2 of 6.*not within \[0, 1\]"),
    (changed(5, [0.1, 0.1, 0.1, 0.4]), "box 6 of 6.*is empty.*allow_empty_boxes"),
    (changed(5, [0.1, 0.1, 0.4, 0.1]), "box 6 of 6.*is empty"),
    (changed(2, [np.nan, 0.1, 0.4, 0.4]), "box 3 of 6.*NaN or infinite"),
    (changed(2, [0.1, 0.1, np.inf, 0.4]), "box 3 of 6.*NaN or infinite"),
    (np.concatenate([xywh(corners()), xywh(corners())[:, 2:]], 1), "box .* of 6"),
    (np.concatenate([corners(), np.zeros((6, 2))], 1), "box 1 of 6.*width or height other than"),
    (np.concatenate([sides(corners()), np.ones((6, 1))], 1), "box 1 of 6.*area other than"),
]


@pytest.mark.parametrize(("boxes", "message"), BAD)
def test_boxes_that_cannot_be_are_named(boxes: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        check_boxes(boxes.astype(np.float32))
    assert "\n" not in str(error.value)


def test_empty_boxes_pass_if_asked_for_and_nothing_else_does() -> None:
    empty = changed(5, [0.1, 0.1, 0.1, 0.4])
    check_boxes(empty, allow_empty=True)
    check_boxes(sides(empty), allow_empty=True)
    with pytest.raises(ValueError, match="x2 < x1"):
        check_boxes(changed(5, [0.2, 0.1, 0.1, 0.4]), allow_empty=True)


def test_confidences_are_within_0_and_1() -> None:
    check_confidences(np.array([1.0, 0.5, 0.0], np.float16))
    for wrong in (1.5, -0.5, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"confidence of box 2 is .*within \[0, 1\]"):
            check_confidences(np.array([0.5, wrong], np.float32))


def test_a_sample_is_the_same_in_every_run_and_no_larger_than_what_is_there() -> None:
    assert sampled(range(10_000)) == sampled(range(10_000))
    assert len(set(sampled(range(10_000)))) == 16
    assert max(sampled(range(10_000))) > 5_000
    assert sampled("abc") == ["a", "b", "c"]
    assert sampled([]) == []


def regions(boxes: np.ndarray, confidences: Any = None) -> dict[str, np.ndarray]:
    count = len(boxes)
    given = np.linspace(0.9, 0.3, count) if confidences is None else confidences
    numbered = np.repeat(np.arange(count, dtype=np.float32)[:, None], 8, 1)
    return {"features": numbered, "norm_bb": boxes.astype(np.float32), "conf": np.asarray(given, np.float32)}


@pytest.mark.parametrize(("boxes", "message"), [row for row in BAD if row[0].shape[1] < 7])
def test_every_store_refuses_them(
    tmp_path: Path, boxes: np.ndarray, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path / "cache"))
    given = boxes if boxes.shape[1] == 6 else np.concatenate([boxes, xywh(boxes)[:, 2:]], 1)
    with ImageDatabaseWriter(tmp_path, BoxSelection()) as writer:
        with pytest.raises(DataError, match=f"image 'a.npz': {message}"):
            writer.add("a.npz", **regions(given))
        writer.add("b.npz", **regions(sides(corners())))
    np.savez(tmp_path / "a.npz", features=np.zeros((6, 8), np.float32), boxes=boxes.astype(np.float32))
    store = FileStore([Source(tmp_path / "a.npz", "train.jsonl:7")])
    for read in (lambda: store[0], lambda: store.prepare([0])):
        with pytest.raises(DataError, match=rf"train.jsonl:7: .*a.npz': {message}"):
            read()


def test_a_tsv_file_is_looked_at_when_its_images_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path / "cache"))
    pixels = xywh(changed(0, [0.6, 0.1, 0.9, 0.4])) * [WIDTH, HEIGHT, WIDTH, HEIGHT]
    line = write_line("a", (HEIGHT, WIDTH), np.zeros((6, 8), "f4"), pixels.astype("f4"), np.ones(6, "f4"))
    (tmp_path / "a.tsv").write_bytes(line)
    with pytest.raises(DataError, match=r"a\.tsv:1: .*box 1 of 6.*x2 < x1"):
        TsvStore([TsvFile(tmp_path / "a.tsv")]).check(["a"], tmp_path / "train.json")


def test_tsv_boxes_are_in_pixels_of_the_image() -> None:
    def line(size: tuple[int, int], boxes: np.ndarray) -> bytes:
        return write_line("a", size, np.zeros((6, 8), "f4"), boxes.astype("f4"), np.ones(6, "f4"))

    pixels = corners() * [WIDTH, HEIGHT, WIDTH, HEIGHT]
    _, _, boxes = read_regions(line((HEIGHT, WIDTH), pixels))
    assert np.allclose(boxes, corners(), atol=1e-6)
    with pytest.raises(ValueError, match="divided by the image's size already"):
        read_regions(line((HEIGHT, WIDTH), corners()))
    wide = changed(0, [0.9, 0.1, 1.0, 0.4]) * [WIDTH, HEIGHT, WIDTH, HEIGHT]
    with pytest.raises(ValueError, match="outside of the image of 480 x 640 pixels; img_h and img_w are swapped"):
        read_regions(line((WIDTH, HEIGHT), wide))
    empty = pixels.copy()
    empty[2, 2] = empty[2, 0]
    with pytest.raises(ValueError, match=r"box 3 of 6.*is empty"):
        read_regions(line((HEIGHT, WIDTH), empty))
    read_regions(line((HEIGHT, WIDTH), empty), allow_empty=True)


@pytest.mark.parametrize("compressed", [False, True])
def test_the_surest_boxes_are_kept_whatever_their_order(tmp_path: Path, compressed: bool) -> None:
    choice = BoxSelection(0.5, max_boxes=4, min_boxes=2, compressed=compressed)
    rising, boxes = np.array([0.1, 0.6, 0.2, 0.9, 0.6, 0.7]), sides(corners())
    order = [3, 5, 1, 4]  # equally sure ones stay in their order
    with ImageDatabaseWriter(tmp_path, choice) as writer:
        writer.add("rising.npz", **regions(boxes, rising))
        writer.add("falling.npz", **regions(boxes, np.sort(rising)[::-1]))
    database = ImageStore(tmp_path, choice)
    database.check(range(2))
    assert read_image(database, "rising.npz")[0][:, 0].tolist() == order
    assert np.array_equal(
        read_image(database, "rising.npz")[1].numpy(), boxes[order].astype(np.float16).astype(np.float32)
    )
    assert read_image(database, "falling.npz")[0][:, 0].tolist() == [0, 1, 2, 3]


def test_a_fixed_number_keeps_the_places_of_the_boxes(tmp_path: Path) -> None:
    with ImageDatabaseWriter(tmp_path, BoxSelection(fixed=3)) as writer:
        writer.add("a.npz", **regions(sides(corners()), [0.1, 7.0, 0.3, 0.9, 0.2, 0.5]))
    assert ImageStore(tmp_path, BoxSelection(fixed=3))[0][0][:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("confidences", [[0.9, np.nan, 0.1, 0.1, 0.1, 0.1], [1.7, 0.5, 0.1, 0.1, 0.1, 0.1]])
def test_confidences_that_boxes_cannot_be_chosen_by_are_refused(tmp_path: Path, confidences: list[float]) -> None:
    writer, wrong = ImageDatabaseWriter(tmp_path, BoxSelection()), regions(sides(corners()), confidences)
    with pytest.raises(DataError, match=r"image 'a.npz': the confidence of box"), writer:
        writer.add("a.npz", **wrong)


def test_a_database_that_was_cut_by_a_wrong_order_is_refused(tmp_path: Path) -> None:
    """Databases made before, or by others, may hold the first of boxes whose confidences rose."""
    choice = BoxSelection(0.2, min_boxes=2)
    for order, right in (([0.1, 0.15, 0.3, 0.5, 0.6, 0.9], False), ([0.3, 0.5, 0.25, 0.6, 0.9, 0.4], True)):
        folder = tmp_path / str(right)
        with ImageDatabaseWriter(folder, BoxSelection(fixed=6)) as writer:
            writer.add("a.npz", **regions(sides(corners()), order))
        (folder / "feat_numbb6").rename(folder / choice.folder())
        (folder / str(choice.counts_file())).write_text('{"a.npz": 6}')
        database = ImageStore(folder, choice)
        if right:  # all were above the threshold, so that their order does not matter
            database.check([0])
        else:
            with pytest.raises(DataError, match=r"'a.npz'.*less sure boxes were kept instead of surer ones"):
                database.check([0])


def test_the_released_databases_pass_in_full(official_db: Path) -> None:
    for folder, choice in (
        ("coco_train2014", BoxSelection()),
        ("coco_train2014", BoxSelection(compressed=True)),
        ("coco_train2014", BoxSelection(fixed=36)),
        ("re_coco_gt", BoxSelection(fixed=100)),
        ("vcr_gt_train", BoxSelection(fixed=100)),
        ("vcr_train", BoxSelection()),
    ):
        database = ImageStore(official_db / "img_db" / folder, choice)
        database.check(range(len(database)))
