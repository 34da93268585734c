"""Columns of names: read like lists of texts, searched by comparison, made once and remade when damaged or old."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from villa.datasets.ragged import Ragged
from villa.datasets.uniter import index
from villa.datasets.uniter.index import Built, Names, cached, find, hashes_of, in_order, refuse_twice

SCHEMA = pa.schema([("name", pa.string()), ("number", pa.int32())])
EXAMPLES = int(os.environ.get("VILLA_FUZZ_EXAMPLES", "50"))
#: Of all kinds: empty, long, not ASCII, with zeros.
TEXTS = st.text(max_size=9) | st.sampled_from(["", "\0", "a\0", "a" * 7, "a" * 8, "a" * 40])


@settings(max_examples=60)
@given(st.lists(TEXTS | st.text(st.characters(exclude_categories=())), max_size=30))
def test_texts_come_back(texts: list[str]) -> None:
    """Halves of surrogate pairs, too, as a path may have them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "CHUNK", 7)
        names = Names.of(texts)
        assert (list(names), len(names), names[1:5:2]) == (texts, len(texts), texts[1:5:2])
        assert [names[row] for row in range(-len(texts), len(texts))] == texts + texts
        taken = names.take(np.arange(len(texts))[::-2])
        assert list(taken) == texts[::-2]
        assert list(taken.take(np.arange(len(taken))[:2])) == texts[::-2][:2] == taken[:2]
        assert list(pickle.loads(pickle.dumps(taken))) == texts[::-2]
        with pytest.raises(IndexError):
            names[len(texts)]


@settings(max_examples=60)
@given(st.lists(TEXTS, max_size=30, unique=True), st.lists(TEXTS, max_size=10), st.integers(1, 40))
def test_names_are_found_however_many_are_searched_at_a_time(texts: list[str], others: list[str], part: int) -> None:
    place = {text: row for row, text in enumerate(texts)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "_SEARCHED", part)
        patch.setattr(index, "CHUNK", 5)
        among, asked = Names.of(texts).column, others + texts[::-1]
        assert find(Names.of(asked).column, among).tolist() == [place.get(text, -1) for text in asked]
        assert find(among, among).tolist() == list(range(len(texts)))
        refuse_twice(among)
        for text in texts[:1]:
            with pytest.raises(ValueError, match="twice"):
                refuse_twice(Names.of([*texts, text]).column)


def test_hashes_depend_on_the_bytes_alone() -> None:
    texts = ["", "a", "b", "12345678", "123456789", "é", "a" * 40, "a" * 41, "\0"]
    hashes = hashes_of(Names.of(texts).column)
    assert len(set(hashes.tolist())) == len(texts)
    order = np.array([4, 2, 8, 0, 6])
    taken = Names.of([texts[row] for row in order])
    assert hashes_of(taken.column).tolist() == hashes[order].tolist()
    assert hashes_of(Names.of(texts).column[2:5]).tolist() == hashes[2:5].tolist()
    assert hashes[1] == 0x95DA58F99F363D7D  # part of the fingerprints of databases


def test_rows_of_several_values() -> None:
    ragged = Ragged(np.array([5, 6, 7, 5, 8]), np.array([0, 2, 2, 5]))
    assert [ragged[row] for row in range(len(ragged))] == [[5, 6], [], [7, 5, 8]]
    taken = ragged.take(np.array([2, 0]))
    assert [taken[row] for row in range(2)] == [[7, 5, 8], [5, 6]]
    assert ragged.take(np.arange(3)) is ragged
    assert ragged.sums(np.array([1, 2, 3, 4, 5])).tolist() == [3, 0, 12]
    assert taken.sums(np.array([1, 2, 3, 4, 5])).tolist() == [6, 9]
    single = Ragged(np.array([1, 1]), np.arange(3))
    assert single.sums(np.array([4, 5])).tolist() == [4, 5]
    assert in_order(np.array([3, 1, 3, 0, 1]), 5).tolist() == [3, 1, 0]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """All files count as large; returns the folder of their indexes."""
    monkeypatch.setattr(index, "LARGE", 1)
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "indexes"


def table(count: int, add: int = 0) -> pa.Table:
    return pa.table(
        [[f"id-{number}" for number in range(count)], pa.array(range(add, count + add), pa.int32())], SCHEMA
    )


class Builder:
    """Counts how often a table was made of a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.made = path, 0

    def __call__(self) -> Built:
        self.made += 1
        count = int(self.path.read_text())
        yield table(count)
        yield table(2, add=count)

    def read(self) -> list[int]:
        numbers: list[int] = cached([self.path], "numbers", SCHEMA, self)["number"].to_pylist()
        return numbers


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    path = tmp_path / "list[1].json"
    path.write_text("100")
    return Builder(path)


def test_an_index_is_made_once_and_again_when_its_file_changes(kept: Path, builder: Builder) -> None:
    assert builder.read() == builder.read() == [*range(100), 100, 101]
    (file,) = kept.glob("*.arrow")
    assert builder.made == 1
    builder.path.write_text("200")
    stat = builder.path.stat()
    assert builder.read()[-1] == 201
    assert not file.exists()  # the old one is gone
    builder.path.write_text("300")
    os.utime(builder.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert builder.read()[-1] == 301  # same size, same time
    assert len(list(kept.glob("*.arrow"))) == 1
    assert builder.made == 3


def test_small_files_are_not_indexed(kept: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "LARGE", 1 << 20)
    assert builder.read()[-1] == 101
    assert not kept.exists()
    assert len(cached([builder.path], "numbers", SCHEMA, builder, size=1 << 20)) == 102
    assert len(list(kept.glob("*.arrow"))) == 1


def test_what_earlier_versions_kept_is_left_alone(kept: Path, builder: Builder) -> None:
    """They kept folders of arrays, and texts, beside each other."""
    builder.read()
    (file,) = kept.glob("*.arrow")
    old = kept / file.name.removesuffix(".arrow")
    old.mkdir()
    (old / "index.json").write_text('{"values": ["<i4", 3]}')
    (kept / "0123456789abcdef.txt").write_text("fingerprint")
    file.unlink()
    assert builder.read() == builder.read() == [*range(100), 100, 101]
    assert (old / "index.json").exists()
    assert builder.made == 2


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _other_columns(file: Path) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, SCHEMA.remove(1)) as writer:
        writer.write_table(table(3).drop_columns(["number"]))


def _make_folder(file: Path) -> None:
    file.unlink()
    file.write_text("{")


@pytest.mark.parametrize("damage", [_truncate, _empty, _other_columns, _make_folder])
def test_a_damaged_index_is_made_again(kept: Path, builder: Builder, damage: Callable[[Path], None]) -> None:
    builder.read()
    (file,) = kept.glob("*.arrow")
    damage(file)
    assert builder.read() == builder.read() == [*range(100), 100, 101]
    assert builder.made == 2


@settings(max_examples=EXAMPLES)
@given(st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6), st.floats(0, 1))
def test_bytes_that_were_altered_never_end_the_process(
    kept: Path, builder: Builder, changes: list[tuple[float, bytes]], cut: float
) -> None:
    builder.read()
    (file,) = kept.glob("*.arrow")
    data = bytearray(file.read_bytes())
    for where, value in changes:
        place = int(where * (len(data) - 1))
        data[place : place + len(value)] = value
    file.write_bytes(data[: len(data) if cut > 0.5 else int(cut * 2 * len(data))])
    read = cached([builder.path], "numbers", SCHEMA, builder)
    assert read.schema.equals(SCHEMA)
    names = Names(read["name"])
    assert len(list(names)) == len(read)
    find(Names.of(["id-3"]).column, read["name"])
    hashes_of(read["name"])
    file.unlink()


def test_of_several_processes_one_makes_the_index_and_the_others_wait(
    kept: Path, builder: Builder, tmp_path: Path
) -> None:
    made = tmp_path / "made"

    def slowly() -> Built:
        with made.open("a") as file:
            file.write("x")
        time.sleep(0.3)
        yield table(500)

    context = multiprocessing.get_context("fork")
    together = context.Barrier(3)

    def rank() -> None:
        together.wait()
        os._exit(0 if cached([builder.path], "slow", SCHEMA, slowly).equals(table(500)) else 1)

    ranks = [context.Process(target=rank) for _ in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(600)
    assert [process.exitcode for process in ranks] == [0, 0, 0]
    assert made.read_text() == "x"


def test_without_a_cache_folder_the_index_stays_in_memory(
    kept: Path, builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert builder.read() == [*range(100), 100, 101]
    assert "is not kept" in caplog.text


def test_what_cannot_be_made_leaves_nothing_behind(kept: Path, builder: Builder) -> None:
    def fails() -> Built:
        yield table(3)
        raise ValueError("it is wrong")

    with pytest.raises(ValueError, match="it is wrong"):
        cached([builder.path], "numbers", SCHEMA, fails)
    assert [file.suffix for file in kept.iterdir()] == [".lock"]
    assert builder.read()[-1] == 101
    builder.path.unlink()
    with pytest.raises(OSError, match="No such file"):
        builder.read()


def test_many_names_take_little_memory_and_are_found() -> None:
    count = 600_000
    names = Names.of([f"image_{number:09}.npz" for number in range(count)])
    assert names.column.nbytes <= 23.2 * count
    chosen = random.Random(0).sample(range(count), 2000)
    asked = Names.of([f"image_{number:09}.npz" for number in chosen] + ["image_.npz"])
    assert find(asked.column, names.column).tolist() == [*chosen, -1]
    assert list(names.take(np.array(chosen[:9]))) == [f"image_{number:09}.npz" for number in chosen[:9]]
