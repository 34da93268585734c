import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import msgpack_numpy
import numpy as np
import pytest
from named_stores import images_of, lengths_of, read_image, read_text, row_of

from villa.datasets.uniter import writers as lmdb_filling
from villa.datasets.uniter.image_lmdb import BoxSelection, ImageStore
from villa.datasets.uniter.lmdb_env import LmdbReader
from villa.datasets.uniter.packed_arrays import read_msgpack
from villa.datasets.uniter.text_lmdb import TextStore
from villa.datasets.uniter.writers import ImageDatabaseWriter, TextDatabaseWriter
from villa.errors import DataError

META = {"CLS": 101, "SEP": 102, "MASK": 103, "v_range": [106, 500]}
ARRAYS = ("features", "norm_bb", "conf", "soft_labels")


def values_of(folder: Path) -> dict[str, bytes]:
    """Everything in an environment."""
    reader = LmdbReader(folder)
    return {key: bytes(reader.get(key) or b"") for key in reader}


def regions(rows: int = 12, dim: int = 32, seed: int = 0) -> dict[str, Any]:
    values = np.random.default_rng(seed)
    corners = np.sort(values.random((rows, 2, 2), dtype=np.float32), 1).reshape(rows, 4)
    return {
        "features": values.random((rows, dim), dtype=np.float32),
        "norm_bb": np.concatenate([corners, corners[:, 2:] - corners[:, :2]], 1),
        "conf": np.sort(values.random(rows, dtype=np.float32))[::-1],
        "soft_labels": values.random((rows, 17), dtype=np.float32),
    }


@pytest.mark.parametrize("compressed", [False, True])
def test_image_databases_equal_the_released_ones(official_db: Path, tmp_path: Path, compressed: bool) -> None:
    folder, boxes = official_db / "img_db" / "coco_train2014", BoxSelection(compressed=compressed)
    released = ImageStore(folder, boxes)
    everything = LmdbReader(folder / "all")
    with ImageDatabaseWriter(tmp_path, boxes, puts=7) as writer:
        for name in released.names:
            value = everything.get(name)
            assert value is not None
            writer.add(name, **read_msgpack(value, ARRAYS))
    written = ImageStore(tmp_path, boxes)
    assert written.fingerprint() == released.fingerprint()
    counts = str(boxes.counts_file())
    assert json.loads((tmp_path / counts).read_text()) == json.loads((folder / counts).read_text())
    if compressed:  # their bytes depend on the version of zlib
        for row in range(len(released)):
            assert all((a == b).all() for a, b in zip(written[row], released[row], strict=True))
    else:
        assert values_of(written.folder) == values_of(released.folder)


@pytest.mark.parametrize("name", ["vcr_train.db", "itm_flickr30k_val.db", "nlvr2_dev.db", "refcoco_val.db"])
def test_text_databases_equal_the_released_ones(official_db: Path, tmp_path: Path, name: str) -> None:
    released = TextStore(official_db / "txt_db" / name)
    kinds = ("qa", "qar") if name == "vcr_train.db" else ("",)
    lengths = {kind: lengths_of(released, kind) for kind in kinds}
    with TextDatabaseWriter(tmp_path / name, released.meta, texts_of_images="itm" in name, puts=10) as writer:
        for id in lengths[kinds[0]]:
            length = {kind: lengths[kind][id] for kind in kinds} if "qa" in kinds else lengths[""][id]
            images = None if "refcoco" in name else images_of(released)[id]
            writer.add(id, read_text(released, id, kinds[0]), length, images)
    written = TextStore(tmp_path / name)
    assert values_of(written.path) == values_of(released.path)
    assert written.fingerprint() == released.fingerprint()
    for file in released.path.glob("*.json"):
        if file.name in {"annotations.json", "categories.json", "images.json", "refs.json"}:
            continue  # written by whoever converts the annotations
        ordered = json.loads((written.path / file.name).read_text())
        assert list(ordered.items()) == list(json.loads(file.read_text()).items())


def test_the_released_way_of_decoding_reads_what_is_written(tmp_path: Path) -> None:
    arrays = regions()
    with ImageDatabaseWriter(tmp_path, BoxSelection(threshold=0.5, min_boxes=2)) as writer:
        writer.add("a.npz", **arrays)
    value = values_of(tmp_path / "feat_th0.5_max100_min2")["a.npz"]
    decoded = msgpack.unpackb(value, raw=False, object_hook=msgpack_numpy.decode)
    rows = int((arrays["conf"] > 0.5).sum())
    assert set(decoded) == set(ARRAYS)
    for name, array in decoded.items():
        assert array.dtype == np.float16
        np.testing.assert_array_equal(array, arrays[name][:rows].astype(np.float16))


def test_a_fixed_number_keeps_the_first_boxes_and_needs_no_counts(tmp_path: Path) -> None:
    with ImageDatabaseWriter(tmp_path, BoxSelection(fixed=5)) as writer:
        for rows in (3, 12):
            arrays = regions(rows)
            writer.add(f"{rows}.npz", arrays["features"], arrays["norm_bb"], arrays["conf"])
    database = ImageStore(tmp_path, BoxSelection(fixed=5))
    assert [len(read_image(database, f"{rows}.npz")[0]) for rows in (3, 12)] == [3, 5]
    assert not list(tmp_path.glob("*.json"))
    with pytest.raises(DataError, match="has no soft_labels"):
        database.soft_labels(row_of(database, "3.npz"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"features": np.zeros((0, 32), np.float32)}, "R >= 1"),
        ({"features": np.zeros(12, np.float32)}, r"features is float32 \[12\]"),
        ({"features": np.zeros((12, 32), np.int64)}, "features is int64"),
        ({"norm_bb": np.zeros((12, 7), np.float32)}, r"norm_bb is float32 \[12, 7\]"),
        ({"norm_bb": np.zeros((11, 6), np.float32)}, r"norm_bb is float32 \[11, 6\]"),
        ({"conf": np.zeros((12, 1), np.float32)}, r"conf is float32 \[12, 1\]"),
        ({"soft_labels": np.zeros(12, np.float32)}, r"soft_labels is float32 \[12\]"),
        ({"features": np.full((12, 32), 70_000, np.float32)}, "features holds .* too large for float16"),
        ({"features": np.full((12, 32), np.nan, np.float32)}, "features holds NaN"),
    ],
)
def test_images_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    with ImageDatabaseWriter(tmp_path, BoxSelection()) as writer:
        with pytest.raises(DataError, match=problem):
            writer.add("a.npz", **{**regions(), **change})
        assert not writer.has("a.npz")


def write_texts(path: Path, ids: range, **options: Any) -> None:
    with TextDatabaseWriter(path, META, **options) as writer:
        for number in ids:
            if not writer.has(str(number)):
                writer.add(str(number), {"input_ids": [number]}, 1, f"{number % 3}.npz")


def test_an_exception_leaves_an_unfinished_database_to_go_on_with(tmp_path: Path) -> None:
    def interrupted() -> None:
        with TextDatabaseWriter(tmp_path / "db", META, puts=4) as writer:
            for number in range(10):
                writer.add(str(number), {"input_ids": [number]}, 1, f"{number % 3}.npz")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with TextDatabaseWriter(tmp_path / "db", META) as writer:
        assert len(writer) == 10
        for number in range(10, 20):
            writer.add(str(number), {"input_ids": [number]}, 1, f"{number % 3}.npz")
    write_texts(tmp_path / "straight", range(20))
    assert lengths_of(TextStore(tmp_path / "db")) == lengths_of(TextStore(tmp_path / "straight"))


def killed(path: Path, count: int) -> None:
    """Add up to ``count`` texts in a child that is killed before it can close."""
    child = os.fork()
    if not child:
        writer = TextDatabaseWriter(path, META, puts=4)
        for number in range(count):
            if not writer.has(str(number)):
                writer.add(str(number), {"input_ids": [number]}, 1, f"{number % 3}.npz")
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_killed_writer_ends_with_the_same_database(tmp_path: Path) -> None:
    for count in (10, 19):
        killed(tmp_path / "db", count)
    with pytest.raises(DataError, match=r"lacks meta.json"):
        TextStore(tmp_path / "db")  # cannot be taken for a finished one
    with TextDatabaseWriter(tmp_path / "db", META) as writer:
        assert len(writer) == 16  # whole transactions of four: 8, then 8 more
        for number in range(16, 20):
            writer.add(str(number), {"input_ids": [number]}, 1, f"{number % 3}.npz")
    write_texts(tmp_path / "straight", range(20))
    assert values_of(tmp_path / "db") == values_of(tmp_path / "straight")
    for name in ("id2len.json", "txt2img.json", "meta.json"):
        assert (tmp_path / "db" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert not (tmp_path / "db" / lmdb_filling.JOURNAL).exists()


def test_the_journal_is_mended(tmp_path: Path) -> None:
    """A kill between journal and commit, or within a line, leaves records too many or half a record."""
    writer = TextDatabaseWriter(tmp_path / "db", META)
    writer.add("0", {"input_ids": [0]}, 1)
    writer._filling.release()
    with (tmp_path / "db" / lmdb_filling.JOURNAL).open("a") as journal:
        journal.write('["1", [1, null]]\n["2", [1, nu')
    with TextDatabaseWriter(tmp_path / "db", META) as writer:
        assert [writer.has(id) for id in "012"] == [True, False, False]
        writer.add("2", {"input_ids": [2]}, 1)
    assert list(lengths_of(TextStore(tmp_path / "db"))) == ["0", "2"]


@pytest.mark.parametrize("journal", ["", "not JSON", '{"text database": {}}\n', "HEADER\nnot JSON\n", "HEADER\n[1]\n"])
def test_a_damaged_or_another_journal_is_refused(tmp_path: Path, journal: str) -> None:
    writer = TextDatabaseWriter(tmp_path / "db", META)
    header = writer._filling._header
    writer._filling.release()
    (tmp_path / "db" / lmdb_filling.JOURNAL).write_text(journal.replace("HEADER", header))
    for _ in range(2):  # nothing stays open or locked
        with pytest.raises(DataError, match=r"cannot write|other settings"):
            TextDatabaseWriter(tmp_path / "db", META)


def test_a_finished_database_and_other_settings_are_refused(tmp_path: Path) -> None:
    write_texts(tmp_path / "db", range(3))
    with pytest.raises(DataError, match="holds a finished database"):
        TextDatabaseWriter(tmp_path / "db", META)
    TextDatabaseWriter(tmp_path / "other", META)._filling.release()
    with pytest.raises(DataError, match="was begun with other settings"):
        TextDatabaseWriter(tmp_path / "other", {**META, "CLS": 1})
    with pytest.raises(DataError, match="SEP is None"):
        TextDatabaseWriter(tmp_path / "third", {"CLS": 101})


def test_only_one_process_writes(tmp_path: Path) -> None:
    writer = TextDatabaseWriter(tmp_path / "db", META)
    with pytest.raises(DataError, match="being written by another process"):
        TextDatabaseWriter(tmp_path / "db", META)
    writer.close()


def test_names_are_unique_and_fit(tmp_path: Path) -> None:
    with TextDatabaseWriter(tmp_path / "db", META) as writer:
        writer.add("1", {"input_ids": [1]}, 1)
        with pytest.raises(DataError, match="'1' was added already"):
            writer.add("1", {"input_ids": [1]}, 1)
        for name in ("", "n" * 512):
            with pytest.raises(DataError, match="1 to 511 fit"):
                writer.add(name, {"input_ids": [1]}, 1)


def test_the_map_grows_and_the_file_holds_only_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmdb_filling, "MAP_SIZE", 1 << 16)
    with ImageDatabaseWriter(tmp_path, BoxSelection(), puts=8) as writer:
        for number in range(20):
            writer.add(f"{number}.npz", **regions(100, 256, number))
    data = tmp_path / BoxSelection().folder() / "data.mdb"
    assert 1 << 19 < data.stat().st_size < 1 << 21
    database = ImageStore(tmp_path, BoxSelection())
    rows = database.count(row_of(database, "19.npz"))
    expected = regions(100, 256, 19)["features"][:rows].astype(np.float16)
    np.testing.assert_array_equal(read_image(database, "19.npz")[0].numpy(), expected)


def test_a_full_disk_is_one_line_and_costs_no_committed_work(tmp_path: Path) -> None:
    """The limit on the size of files stands for a full disk: writes fail in the same place."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = ImageDatabaseWriter(tmp_path, BoxSelection(), puts=2)

    def fill() -> None:
        for number in range(20):
            writer.add(f"{number}.npz", **regions(100, 1024, number))

    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(DataError, match="check the disk, and run again") as error:
            fill()
        assert "\n" not in str(error.value)
        with pytest.raises(DataError):
            writer._filling.release()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with ImageDatabaseWriter(tmp_path, BoxSelection()) as writer:
        assert 2 <= len(writer) < 10
        kept = list(writer._filling.records)
    database = ImageStore(tmp_path, BoxSelection())
    for name in kept:
        assert len(read_image(database, name)[0]) == database.count(row_of(database, name))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the database"):
        TextDatabaseWriter(tmp_path / "file" / "db", META)


def test_the_released_format_of_lmdb_is_written(tmp_path: Path) -> None:
    """Readers of 2020 know version 1 of the data format only."""
    write_texts(tmp_path / "db", range(3))
    assert (tmp_path / "db" / "data.mdb").read_bytes()[16:24] == bytes.fromhex("dec0efbe01000000")
    with lmdb.open(str(tmp_path / "db"), readonly=True, lock=False) as environment:
        assert environment.stat()["entries"] == 3
