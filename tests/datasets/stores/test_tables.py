"""Large JSON files are parsed in pieces, indexed once, and read from the index as long as they stay the same."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from villa.datasets.uniter import indexes, json_pieces, tables
from villa.datasets.uniter.json_pieces import MemoryFile, parse, pieces
from villa.datasets.uniter.tables import NotAnObjectError, WrongEntryError, read_names, read_numbers
from villa.errors import DataError

TEXTS = st.text(st.sampled_from('a,:"\\[]{} é'), max_size=6)


@settings(deadline=None, max_examples=150)
@given(
    st.dictionaries(TEXTS, st.integers(0, 99) | TEXTS | st.lists(TEXTS, max_size=3), min_size=1, max_size=30),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from([None, 1]),
)
def test_pieces_are_the_whole(value: dict[str, Any], piece: int, ascii_only: bool, indent: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_pieces, "PIECE", piece)
        patch.setattr(json_pieces, "_TAIL", piece)
        data = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
        assert [pair for part in pieces(io.BytesIO(data)) for pair in parse(part)] == list(value.items())
        names = json.dumps(list(value), ensure_ascii=ascii_only, indent=indent).encode()
        assert [name for part in pieces(MemoryFile(memoryview(names))) for name in parse(part)] == list(value)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """All files count as large, and are read a few bytes at a time; the cache is empty."""
    monkeypatch.setattr(json_pieces, "PIECE", 64)
    for module in (indexes, tables):
        monkeypatch.setattr(module, "LARGE", 1)
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "indexes"


@pytest.mark.parametrize("damage", ["{", "}", ",", '"', "]", "x", "\xff"])
def test_damage_anywhere_is_an_error(small_pieces: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "id2len.json"
    text = json.dumps({str(number): number for number in range(60)})
    for at in (0, 1, 100, 333, len(text) - 1, len(text)):
        path.write_text(text[:at] + damage + text[at:], encoding="latin-1")
        try:
            expected = dict(json.loads(path.read_bytes()))
        except ValueError:
            with pytest.raises((ValueError, WrongEntryError)):
                read_numbers(path, 0)
        else:
            assert dict(read_numbers(path, 0)) == expected


def test_values_and_names_that_are_wrong_are_told(small_pieces: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    many = {str(number): 1 for number in range(50)}
    for value in (-1, 1.5, True, None, "1", 1 << 31, {"a": 1}, [2]):
        path.write_text(json.dumps({**many, "bad": value}))
        with pytest.raises(WrongEntryError) as wrong:
            read_numbers(path, 0)
        assert wrong.value.name == "bad"
    for names in (3, None, {"a": "b"}, ["a", 3], [["a"]]):
        path.write_text(json.dumps({**dict.fromkeys(many, "a.npz"), "bad": names}))
        with pytest.raises(WrongEntryError, match="bad"):
            read_names(path)
    path.write_text(json.dumps(list(many)))
    with pytest.raises(NotAnObjectError, match="list"):
        read_numbers(path, 0)
    path.write_text(json.dumps(many)[:-1] + ', "7": 3}')
    with pytest.raises(ValueError, match="'7' twice"):
        read_numbers(path, 0)
    path.write_text('"' + "a" * 300)
    with pytest.raises(ValueError, match="does not begin with an object"):
        read_numbers(path, 0)


def test_an_entry_without_an_end_is_an_error(small_pieces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_pieces, "LONGEST", 500)
    with pytest.raises(ValueError, match="no entry ends within 500 bytes"):
        list(pieces(io.BytesIO(b'{"' + b"a" * 2000)))


def numbers(count: int, add: int = 0) -> dict[str, int]:
    return {f"id-{number}": number + add for number in range(count)}


def test_an_index_is_made_once_and_again_when_its_file_changes(small_pieces: Path, tmp_path: Path) -> None:
    path = tmp_path / "id2len.json"
    path.write_text(json.dumps(numbers(1000)))
    read = read_numbers(path, 0)
    assert dict(read) == numbers(1000)
    (folder,) = [entry for entry in small_pieces.iterdir() if entry.is_dir()]
    made = folder.stat().st_mtime_ns
    again = read_numbers(path, 0)
    assert again["id-77"] == 77
    assert "id-1000" not in again
    assert folder.stat().st_mtime_ns == made
    changed = json.dumps(numbers(1000, add=1))
    path.write_text(changed)
    assert dict(read_numbers(path, 0)) == numbers(1000, add=1)
    assert not folder.exists()  # the old one is gone
    stat = path.stat()
    path.write_text(changed.replace('"id-3": 4', '"id-3": 5'))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert read_numbers(path, 0)["id-3"] == 5  # same size, same time


def test_of_several_processes_one_makes_the_index_and_the_others_wait(
    small_pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = tmp_path / "id2len.json", tmp_path / "made"
    path.write_text(json.dumps(numbers(500)))
    build = tables._build_numbers

    def slowly(path: Path, least: int) -> Any:
        with made.open("a") as file:
            file.write("x")
        time.sleep(0.3)
        yield from build(path, least)

    monkeypatch.setattr(tables, "_build_numbers", slowly)
    context = multiprocessing.get_context("fork")
    together = context.Barrier(3)

    def rank() -> None:
        together.wait()
        os._exit(0 if dict(read_numbers(path, 0)) == numbers(500) else 1)

    ranks = [context.Process(target=rank) for _ in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0, 0]
    assert made.read_text() == "x"


def _truncate(folder: Path) -> None:
    file = folder / "values.npy"
    file.write_bytes(file.read_bytes()[:-8])


def _swap(folder: Path) -> None:
    (folder / "values.npy").write_bytes((folder / "keys_table.npy").read_bytes())


def _lose(folder: Path) -> None:
    (folder / "keys_data.npy").unlink()


def _garble(folder: Path) -> None:
    (folder / "index.json").write_text("{")


@pytest.mark.parametrize("damage", [_truncate, _swap, _lose, _garble])
def test_a_damaged_index_is_made_again(small_pieces: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "id2len.json"
    path.write_text(json.dumps(numbers(100)))
    read_numbers(path, 0)
    (folder,) = [entry for entry in small_pieces.iterdir() if entry.is_dir()]
    damage(folder)
    assert dict(read_numbers(path, 0)) == numbers(100)
    assert dict(read_numbers(path, 0)) == numbers(100)


def test_without_a_cache_folder_the_index_stays_in_memory(
    small_pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "id2len.json"
    path.write_text(json.dumps(numbers(100)))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path / "file"))
    assert dict(read_numbers(path, 0)) == numbers(100)
    assert "is not kept" in caplog.text
    assert indexes.remembered([path], None, lambda: "value") == "value"


def test_a_text_is_remembered_as_long_as_its_files_are_the_same(small_pieces: Path, tmp_path: Path) -> None:
    made: list[str] = []
    file = tmp_path / "file"

    def value(content: str, facts: object) -> str:
        file.write_text(content)
        os.utime(file, ns=(1, 1))
        return indexes.remembered([file], facts, lambda: made.append(content) or content)

    assert [value("a", 1), value("a", 1), value("b", 1), value("b", 2), value("a", 1)] == ["a", "a", "b", "b", "a"]
    assert made == ["a", "b", "b"]
    file.unlink()
    with pytest.raises(DataError, match=r"cannot read '.*file'"):
        indexes.remembered([file], 1, lambda: "x")


def test_names_with_and_without_lists_survive_the_index(small_pieces: Path, tmp_path: Path) -> None:
    path, draws = tmp_path / "txt2img.json", random.Random(0)
    single: dict[str, Any] = {f"t{number}": f"i{number // 5}.npz" for number in range(500)}
    mixed = {text: draws.choice([name, [name], [name, "é"], []]) for text, name in single.items()}
    for names in (single, mixed):
        path.write_text(json.dumps(names))
        for _ in range(2):
            read = read_names(path)
            assert dict(read) == names
            assert list(read.names) == list(names.values())
            assert "t500" not in read
