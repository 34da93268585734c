"""Large JSON files are read a piece at a time; what is no JSON, or a wrong entry, is told."""

from __future__ import annotations

import json
import random
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from villa.datasets.uniter import index, json_tables
from villa.datasets.uniter.json_tables import (
    NamedImages,
    NotAnObjectError,
    WrongEntryError,
    list_names,
    read_images,
    read_numbers,
)

TEXTS = st.text(st.sampled_from('a,:"\\[]{} é\0'), max_size=6)
fixtures = settings(max_examples=150)


def numbers(path: Path, least: int = 0) -> dict[str, int]:
    table = read_numbers(path, least)
    return dict(zip(table["name"].to_pylist(), table["number"].to_pylist(), strict=True))


def images(named: NamedImages) -> dict[str, Any]:
    names, found = iter(named.names.to_pylist()), {}
    for text, size, listed in zip(named.texts.to_pylist(), named.sizes.tolist(), named.listed.tolist(), strict=True):
        own = [next(names) for _ in range(size)]
        found[text] = own if listed else own[0]
    return found


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All files count as large, and are read a few bytes and entries at a time; the cache is empty."""
    for name, size in (("_BLOCK", 64), ("_AT_ONCE", 3), ("CHUNK", 7)):
        monkeypatch.setattr(json_tables, name, size)
    monkeypatch.setattr(index, "LARGE", 1)
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path / "cache"))


@fixtures
@given(
    st.dictionaries(TEXTS, st.integers(0, 99), max_size=30),
    st.dictionaries(TEXTS, TEXTS | st.lists(TEXTS, max_size=3), max_size=30),
    st.booleans(),
    st.sampled_from([None, 1]),
    st.sampled_from([b"", BOM_UTF8, b" \n"]),
)
def test_files_hold_what_was_written(
    small_pieces: None,
    tmp_path: Path,
    lengths: dict[str, int],
    named: dict[str, Any],
    ascii_only: bool,
    indent: int | None,
    start: bytes,
) -> None:
    def write(name: str, value: Any) -> Path:
        (tmp_path / name).write_bytes(start + json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode())
        return tmp_path / name

    assert list(numbers(write("id2len.json", lengths)).items()) == list(lengths.items())
    assert list(images(read_images(write("txt2img.json", named))).items()) == list(named.items())
    names = list_names(memoryview(json.dumps(list(named), ensure_ascii=ascii_only, indent=indent).encode()))
    assert names["name"].to_pylist() == list(named)


@pytest.mark.parametrize("damage", ["{", "}", ",", '"', "]", "x", "\xff", "\0"])
def test_damage_anywhere_is_an_error(small_pieces: None, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "id2len.json"
    text = json.dumps({str(number): number for number in range(60)})
    for at in (0, 1, 100, 333, len(text) - 1, len(text)):
        path.write_text(text[:at] + damage + text[at:], encoding="latin-1")
        try:
            expected = dict(json.loads(path.read_bytes()))
        except ValueError:
            with pytest.raises((ValueError, WrongEntryError)) as told:
                numbers(path)
            assert "\n" not in str(told.value)
        else:
            assert numbers(path) == expected


def test_values_and_names_that_are_wrong_are_told(small_pieces: None, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    many = {str(number): 1 for number in range(50)}
    for value in (-1, 1.5, True, None, "1", 1 << 31, {"a": 1}, [2]):
        path.write_text(json.dumps({**many, "bad": value}))
        with pytest.raises(WrongEntryError) as wrong:
            numbers(path)
        assert (wrong.value.name, wrong.value.value) == ("bad", value)
    for names in (3, None, {"a": "b"}, ["a", 3], [["a"]]):
        path.write_text(json.dumps({**dict.fromkeys(many, "a.npz"), "bad": names}))
        with pytest.raises(WrongEntryError, match="bad"):
            read_images(path)
    path.write_text(json.dumps(many)[:-1] + ', "7": 3}')
    with pytest.raises(ValueError, match="'7' twice"):
        numbers(path)
    path.write_text('{"a": "x", "b": ["y"], "a": "z"}')
    with pytest.raises(ValueError, match="'a' twice"):
        read_images(path)
    for least, allowed in ((0, True), (1, False)):
        path.write_text('{"a": 0}')
        if allowed:
            assert numbers(path, least) == {"a": 0}
        else:
            with pytest.raises(WrongEntryError):
                numbers(path, least)


@pytest.mark.parametrize(
    ("text", "kind"),
    [('["7", 3]', "list"), ('"text"', "str"), ("12", "int"), ("1.5", "float"), ("true", "bool"), (" null", "NoneType")],
)
def test_another_value_than_an_object_is_told(small_pieces: None, tmp_path: Path, text: str, kind: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(NotAnObjectError, match=kind):
        numbers(tmp_path / "x.json")


@pytest.mark.parametrize(
    "text",
    ["", "[1", '"' + "a" * 300, "[" * 100_000, '{"a": ' * 100_000, "nul", "1 2", '{"a": "\\\\"} "}', '{"a": "\\""}"'],
)
def test_what_is_no_json_is_told(small_pieces: None, tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        numbers(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["{}", "", '"a"', "[1]", '["a", null]', '["a", "a"]', '["a"] x', '["a', "[[]]"])
def test_a_list_of_other_things_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^(it |premature|trailing|parse)"):
        list_names(memoryview(text.encode()))


def test_an_entry_without_an_end_is_an_error(
    small_pieces: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_tables, "LONGEST", 500)
    (tmp_path / "x.json").write_bytes(b'{"' + b"a" * 2000)
    with pytest.raises(ValueError, match="no entry ends within 500 bytes"):
        numbers(tmp_path / "x.json")


def test_names_with_and_without_lists_survive_the_index(small_pieces: None, tmp_path: Path) -> None:
    path, draws = tmp_path / "txt2img.json", random.Random(0)
    single: dict[str, Any] = {f"t{number}": f"i{number // 5}.npz" for number in range(500)}
    mixed = {text: draws.choice([name, [name], [name, "é"], []]) for text, name in single.items()}
    for names in (single, mixed):
        path.write_text(json.dumps(names))
        for _ in range(2):
            assert images(read_images(path)) == names
