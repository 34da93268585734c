"""LXMERT's feature files: index, random reads, damage."""

import base64
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from villa.datasets.lxmert import features as tsv
from villa.datasets.lxmert.features import FIELDS, TsvFile, TsvStore, read_header, read_regions, write_line
from villa.errors import DataError

WIDTH, HEIGHT, DIM = 640, 480, 8
Arrays = dict[str, tuple[np.ndarray, np.ndarray]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def draw(count: int, dim: int = DIM) -> Arrays:
    random = np.random.default_rng(3)
    made = {}
    for number in range(count):
        regions = 1 + number % 5
        corners = random.uniform(0, 200, (regions, 2))
        boxes = np.concatenate([corners, corners + random.uniform(1, 200, (regions, 2))], 1)
        made[f"img_{number}"] = (random.normal(size=(regions, dim)).astype("f4"), boxes.astype("f4"))
    return made


def line_of(name: str, features: np.ndarray, boxes: np.ndarray) -> bytes:
    return write_line(name, (HEIGHT, WIDTH), features, boxes, np.ones(len(boxes), dtype="f4"))


@pytest.fixture
def images() -> Arrays:
    return draw(7)


@pytest.fixture
def path(tmp_path: Path, images: Arrays) -> Path:
    file = tmp_path / "train_obj36.tsv"
    file.write_bytes(b"".join(line_of(name, *arrays) for name, arrays in images.items()))
    return file


def check_all(file: TsvFile | TsvStore, images: Arrays) -> None:
    for name in reversed(images):
        features, boxes = file[name]
        assert np.array_equal(features.numpy(), images[name][0])
        assert np.allclose(boxes.numpy(), images[name][1] / [WIDTH, HEIGHT, WIDTH, HEIGHT], rtol=1e-6)
        assert file.count(name) == len(boxes)


def test_every_image_is_read_with_boxes_divided_by_the_size(path: Path, images: Arrays) -> None:
    file = TsvFile(path)
    assert file.dim == DIM
    assert list(file) == list(images)
    assert len(file) == 7
    assert "img_9" not in file
    check_all(file, images)


def test_a_line_of_the_fields_in_the_released_order_is_read(tmp_path: Path) -> None:
    """Written here by hand: int64 ids, float32 the rest, as the fields' list says."""

    def encode(values: list[float] | list[list[float]], kind: str) -> str:
        return base64.b64encode(np.array(values, dtype=kind).tobytes()).decode()

    fields = ["COCO_1", "100", "200", encode([7], "i8"), encode([0.5], "f4"), encode([9], "i8"), encode([0.25], "f4")]
    fields += ["1", encode([[20, 10, 200, 50]], "f4"), encode([[1, 2, 3]], "f4")]
    (tmp_path / "a.tsv").write_text("\t".join(fields))  # without a line feed at the end
    features, boxes = TsvFile(tmp_path / "a.tsv")["COCO_1"]
    assert features.tolist() == [[1, 2, 3]]
    assert np.allclose(boxes.numpy(), [[0.1, 0.1, 1.0, 0.5]])


def test_a_byte_order_mark_is_no_part_of_the_first_name(path: Path, images: Arrays) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert list(TsvFile(path)) == list(images)
    check_all(TsvFile(path), images)


def test_the_file_is_scanned_once(path: Path, images: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    first = TsvFile(path)
    monkeypatch.setattr(tsv, "_scan", lambda *_: pytest.fail("scanned again"))
    second = TsvFile(path)
    check_all(second, images)
    assert second.fingerprint() == first.fingerprint()


def test_a_changed_file_is_indexed_again(path: Path, images: Arrays) -> None:
    before = TsvFile(path).fingerprint()
    more = {**images, "new": (np.ones((2, DIM), "f4"), np.array([[0, 0, 9, 9]] * 2, "f4"))}
    path.write_bytes(b"".join(line_of(name, *arrays) for name, arrays in sorted(more.items(), reverse=True)))
    after = TsvFile(path)
    check_all(after, more)
    assert after.fingerprint() != before


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 1}', "null"])
def test_a_damaged_index_is_made_again(path: Path, images: Arrays, cache: Path, damage: str) -> None:
    TsvFile(path)
    index = next(cache.rglob("*.json"))
    index.write_text(damage)
    check_all(TsvFile(path), images)
    assert json.loads(index.read_text())["names"] == list(images)


def test_without_room_for_an_index_the_file_is_read_all_the_same(
    path: Path, images: Arrays, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file where the cache folder should be")
    check_all(TsvFile(path), images)
    assert "is not kept" in caplog.text


def test_a_feature_folder_may_be_read_only(path: Path, images: Arrays) -> None:
    before = sorted(path.parent.glob("*.tsv*"))
    check_all(TsvFile(path), images)
    assert sorted(path.parent.glob("*.tsv*")) == before  # nothing is written beside it


def test_it_travels_to_other_processes_after_reading(path: Path, images: Arrays) -> None:
    file = TsvFile(path)
    check_all(file, images)
    check_all(pickle.loads(pickle.dumps(file)), images)
    worker = get_context("fork").Process(target=check_all, args=(file, images))
    worker.start()
    worker.join()
    assert worker.exitcode == 0


def test_images_are_found_in_several_files(path: Path, images: Arrays, tmp_path: Path) -> None:
    other = draw(9)
    (tmp_path / "val.tsv").write_bytes(line_of("other", *other["img_8"]))
    store = TsvStore([TsvFile(path), TsvFile(tmp_path / "val.tsv")])
    check_all(store, {**images, "other": other["img_8"]})
    store.check([*images, "other"], tmp_path / "train.json")
    with pytest.raises(DataError, match=r"2 of 3 images that '.*train.json' names are not in .*\(first: 'a'\)"):
        store.check(["a", "img_1", "b"], tmp_path / "train.json")


def test_features_of_two_widths_do_not_mix(path: Path, tmp_path: Path) -> None:
    (tmp_path / "wide.tsv").write_bytes(line_of("wide", *draw(1, dim=16)["img_0"]))
    with pytest.raises(DataError, match=r"8 wide, those of '.*wide.tsv' 16"):
        TsvStore([TsvFile(path), TsvFile(tmp_path / "wide.tsv")])


def replaced(name: str, value: bytes) -> Callable[[bytes], bytes]:
    def change(line: bytes) -> bytes:
        fields = line.rstrip(b"\n").split(b"\t")
        fields[FIELDS.index(name)] = value
        return b"\t".join(fields) + b"\n"

    return change


DAMAGE: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda line: line[: len(line) // 2], "fields with tabs|cut off|bytes"),
    (lambda line: line[:-4] + b"\n", "cut off|features hold"),
    (lambda line: b"\n", "1 fields"),
    (replaced("num_boxes", b"-3"), "num_boxes is '-3'"),
    (replaced("num_boxes", b"7"), "boxes hold"),
    (replaced("img_id", b""), "img_id is empty"),
    (replaced("img_id", b"img_0"), "'img_0' is also in line 1"),
    (replaced("img_id", b"\xff"), "utf-8"),
    (replaced("boxes", b"AAAA"), "boxes hold 3 bytes"),
    (replaced("features", base64.b64encode(b"\0" * 4 * 4 * 4)), "features are 4 wide, those of line 1 8"),
    (replaced("features", b""), "features hold 0 bytes"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_named_with_its_line(path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = damage(lines[3])
    path.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=rf"train_obj36\.tsv:4: not a line of region features: .*({message})"):
        TsvFile(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replaced("boxes", b"!" * 86 + b"=="), "not base64"),
        (replaced("img_w", b"10"), "outside of the image of 10 x 480"),
        (replaced("img_h", b"x"), "img_h is 'x'"),
        (replaced("boxes", base64.b64encode(np.full(16, np.nan, "f4").tobytes())), "NaN"),
    ],
)
def test_what_the_index_does_not_see_is_found_on_reading(
    path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = damage(lines[3])
    path.write_bytes(b"".join(lines))
    file = TsvFile(path)
    with pytest.raises(DataError, match=rf":4: .*{message}"):
        file["img_3"]
    file["img_4"]


def test_a_file_replaced_under_an_open_index_is_noticed(path: Path, images: Arrays) -> None:
    file = TsvFile(path)
    swapped = dict(zip(images, reversed(images.values()), strict=True))
    other = path.with_suffix(".new")
    other.write_bytes(b"".join(line_of(name, *arrays) for name, arrays in swapped.items()))
    shutil.move(other, path)
    with pytest.raises(DataError, match=r"train_obj36\.tsv:"):
        file["img_1"]


def test_a_file_that_is_gone_when_it_is_read_is_named_with_the_line(path: Path) -> None:
    file = TsvFile(path)
    path.unlink()
    with pytest.raises(DataError, match=r"train_obj36\.tsv:2: cannot be read \(No such file or directory\); check the"):
        file["img_1"]


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read '.*nowhere\.tsv'"):
        TsvFile(tmp_path / "nowhere.tsv")
    (tmp_path / "empty.tsv").touch()
    with pytest.raises(DataError, match="is empty"):
        TsvFile(tmp_path / "empty.tsv")


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(line: bytes) -> None:
    for read in (read_header, read_regions):
        with pytest.raises(ValueError, match=r".+"):
            read(line)


def test_the_index_survives_a_failed_write(path: Path, cache: Path, images: Arrays) -> None:
    TsvFile(path)
    assert not list(cache.rglob("*.tmp"))
    os.utime(path, ns=(1, 1))  # another time of change: indexed again over the old index
    check_all(TsvFile(path), images)


def test_of_several_processes_one_makes_the_index_and_the_others_wait(
    path: Path, images: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, scan = get_context("fork"), tsv._scan
    scans, starting = context.Value("i", 0), context.Barrier(3)

    def slow(*given: Any) -> Any:
        with scans.get_lock():
            scans.value += 1
        time.sleep(0.3)
        return scan(*given)

    def rank() -> None:
        starting.wait(600)
        check_all(TsvFile(path), images)

    monkeypatch.setattr(tsv, "_scan", slow)
    ranks = [context.Process(target=rank) for _ in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(600)
    assert [process.exitcode for process in ranks] == [0, 0, 0]
    assert scans.value == 1


def test_of_a_huge_hole_no_more_is_read_than_a_line_may_have(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tsv, "LONGEST_LINE", 1 << 24)
    lines = path.read_bytes().count(b"\n")
    os.truncate(path, 50 << 30)
    with pytest.raises(DataError, match=rf"{path.name}:{lines + 1}: .* it has more than 16,777,216 bytes"):
        TsvFile(path)
