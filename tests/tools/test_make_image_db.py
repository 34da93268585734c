import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tool_runs import load_tool, run_and_kill

from villa.convert.features import make_image_database
from villa.datasets.uniter.box_selection import BoxSelection
from villa.datasets.uniter.image_lmdb import ImageStore
from villa.datasets.uniter.writers import JOURNAL
from villa.errors import DataError

main = load_tool("make_image_db").main

WIDTH = 6


def arrays(number: int, rows: int = 8) -> dict[str, np.ndarray]:
    """Features of an image; the first ``number % rows`` boxes have a confidence above 0.2."""
    random = np.random.default_rng(number)
    confidence = np.where(np.arange(rows) < number % rows, 0.9, 0.1) - 0.001 * np.arange(rows)
    corners = np.sort(random.random((rows, 2, 2)), 1).reshape(rows, 4)
    return {
        "features": random.normal(size=(rows, WIDTH)).astype(np.float32),
        "norm_bb": np.concatenate([corners, corners[:, 2:] - corners[:, :2]], 1).astype(np.float32),
        "conf": confidence.astype(np.float32),
        "soft_labels": random.random((rows, 3)).astype(np.float32),
    }


def write(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        np.savez(folder / f"coco_{number:04}.npz", **arrays(number))
    return folder


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "features", 8)


def check(database: ImageStore, count: int, rows: int | None = None) -> None:
    assert list(database.names) == [f"coco_{number:04}.npz" for number in range(count)]
    for number in range(count):
        given = arrays(number)
        kept = rows or min(max(number % 8, 2), 5)
        features, boxes = database[number]
        assert torch.equal(features, torch.from_numpy(given["features"][:kept].astype(np.float16)))
        assert torch.equal(boxes.half(), torch.from_numpy(given["norm_bb"][:kept].astype(np.float16)))
        assert len(database.soft_labels(number)) == kept


@pytest.mark.parametrize("compressed", [False, True])
def test_boxes_are_chosen_by_confidence(source: Path, compressed: bool, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(source), "img_db/coco", "--max-boxes", "5", "--min-boxes", "2", "--progress", "off"]
    assert main([*arguments, *(["--compressed"] if compressed else [])]) == 0
    boxes = BoxSelection(0.2, 5, 2, compressed=compressed)
    check(ImageStore(Path("img_db/coco"), boxes), 8)
    counts = json.loads(Path("img_db/coco/nbb_th0.2_max5_min2.json").read_text())
    assert list(counts.values()) == [2, 2, 2, 3, 4, 5, 5, 5]
    assert capsys.readouterr().out == f"img_db/coco/{boxes.folder()}: 8 images\n"


def test_a_fixed_number_of_boxes_read_by_other_processes(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(source), "img_db/coco", "--fixed", "4", "--workers", "1", "--progress", "off"]
    assert main(arguments) == 0
    check(ImageStore(Path("img_db/coco"), BoxSelection(fixed=4)), 8, rows=4)
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out == "img_db/coco/feat_numbb4 is finished already\n"
    np.savez(source / "more.npz", **arrays(9))
    assert main(arguments) == 2
    assert "finished database of 8 other files than the 9 given" in capsys.readouterr().err


def test_a_killed_conversion_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "features", 400)
    output = tmp_path / "coco"
    boxes = BoxSelection(0.2, 5, 2)
    journal = output / boxes.folder() / JOURNAL

    def convert(_: list[str]) -> int:
        make_image_database(source, output, boxes, puts=10, progress="off")
        return 0

    # Three writes to the journal mean that the values of two are stored.
    run_and_kill(convert, [], lambda: journal.exists() and journal.read_text().count("\n") > 30)
    assert not (output / "nbb_th0.2_max5_min2.json").exists()
    assert main([str(source), str(output), "--max-boxes", "5", "--min-boxes", "2", "--progress", "off"]) == 0
    assert " of them before)" in capsys.readouterr().out
    check(ImageStore(output, boxes), 400)


def damaged(**changes: Any) -> dict[str, Any]:
    changed = {**arrays(3), **changes}
    return {name: array for name, array in changed.items() if array is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no archive", "cannot read features"),
        (damaged(conf=None), "lacks conf; a feature file holds features, norm_bb, conf"),
        (damaged(norm_bb=np.zeros((8, 4), np.float32)), "norm_bb is float32 [8, 4]"),
        (damaged(norm_bb=200 * arrays(3)["norm_bb"]), "box 1 of 8, "),
        (damaged(norm_bb=arrays(3)["norm_bb"][:, [2, 3, 0, 1, 4, 5]]), "x2 < x1 or y2 < y1; give x1, y1, x2, y2"),
        (damaged(conf=np.full(8, np.nan, np.float32)), "the confidence of box 1 is nan"),
        (damaged(conf=np.zeros((8, 1), np.float32)), "conf has shape [8, 1]"),
        (damaged(conf=np.zeros(7, np.float32)), "conf is float32 [7]"),
        (damaged(features=np.full((8, 6), np.nan, np.float32)), "features holds NaN"),
        (damaged(features=np.array({"a": 1}, dtype=object)), "cannot read features"),
        (damaged(features=np.array(1.0)), "features is float64 []"),
    ],
)
def test_a_damaged_file_is_named(source: Path, capsys: pytest.CaptureFixture[str], content: Any, message: str) -> None:
    path = source / "coco_0003.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    assert main([str(source), "img_db/coco", "--progress", "off"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error
    assert error.count("\n") == 1
    np.savez(path, **arrays(3))
    assert main([str(source), "img_db/coco", "--progress", "off"]) == 0  # goes on after the file is mended


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "out"], "'none' is not a folder"),
        (["empty", "out"], "'empty' holds no .npz file"),
        (["features", "out", "--min-boxes", "0"], "give 1 <= min_boxes <= max_boxes"),
        (["features", "out", "--workers", "-1"], "-1 workers are too few"),
    ],
)
def test_mistakes_are_one_line(
    source: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    Path("empty").mkdir()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("make_image_db: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_boxes_of_no_area_are_kept_if_asked_for(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = arrays(3)["norm_bb"]
    empty[0, [2, 4]] = empty[0, 0], 0
    np.savez(source / "coco_0003.npz", **damaged(norm_bb=empty))
    arguments = [str(source), "img_db/coco", "--progress", "off"]
    assert main(arguments) == 2
    assert "box 1 of 8" in (told := capsys.readouterr().err)
    assert "is empty" in told
    assert main([*arguments, "--allow-empty-boxes"]) == 0
    database = ImageStore(Path("img_db/coco"), BoxSelection(), allow_empty_boxes=True)
    assert database[3][1][0, 4] == 0


def test_the_database_is_compared_with_its_checksums(source: Path) -> None:
    assert main([str(source), "img_db/coco", "--progress", "off"]) == 0
    folder = Path("img_db/coco")
    counts = folder / str(BoxSelection().counts_file())
    counts.write_text(counts.read_text().replace(" ", ""))
    with pytest.raises(DataError, match=r"nbb_.*json' has .* bytes, not .* as when it was made"):
        ImageStore(folder, BoxSelection())
