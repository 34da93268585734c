"""GQA's questions, and the reading of one large JSON object an entry at a time."""

import json
import os
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_files import WriteJson

from villa.convert import annotations as scanner
from villa.convert.annotations import count_gqa, gqa_answers, read_entries, read_gqa
from villa.errors import DataError

QUESTIONS = {
    "02930152": {"imageId": "2354786", "question": "Is the sky dark?", "answer": "yes", "isBalanced": True},
    "07333408": {"imageId": "n161313", "question": "What is on the “wall”?", "answer": "pipe"},
    "1": {"imageId": "n161313", "question": "What is it?", "answer": "pipe"},
}


def test_questions(write_json: WriteJson) -> None:
    path = write_json("questions.json", QUESTIONS)
    first, second, _ = read_gqa(path)
    assert (first.id, first.images, first.fields["answer"]) == ("02930152", "2354786.npz", "yes")
    assert second.texts == {"input_ids": ("What is on the “wall”?",)}
    assert second.where == f"{path}: question 07333408"
    assert count_gqa(path) == 3
    assert gqa_answers([path, path]) == ["pipe", "yes"]


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert count_gqa(tmp_path / "pipe") is None
    with pytest.raises(DataError, match=r"cannot read the file '.*pipe' \(it is a pipe, socket or device, not a file"):
        next(read_gqa(tmp_path / "pipe"))


def test_questions_of_the_test_split_have_no_answer(write_json: WriteJson) -> None:
    path = write_json("questions.json", {"5": {"imageId": "n1", "question": "What is it?"}})
    assert "answer" not in next(read_gqa(path)).fields
    assert gqa_answers([path]) == []


MISTAKES = [
    ({"5": {"question": "What?"}}, "question 5: 'imageId' is missing"),
    ({"5": {"imageId": "n1", "question": "What?", "answer": 3}}, "question 5: 'answer' must be a text"),
    ({"5": "What?"}, "question 5: a JSON object is needed, not a text"),
    ({"5": 7}, "entry 1: '7' where a text or an object should be"),
]
DAMAGE = [
    ("[]", r"'\[' where '{' should be"),
    ("", "it ends too early"),
    ('{"5": {"imageId": "n1"', "entry 1: Expecting"),
    ('{"5": {}', "entry 1: it ends too early"),
    ('{"5": {} "6": {}}', "entry 1: '\"' where ',' should be"),
    ('{"5": {}, }', "entry 2: '}' where a text"),
    ("{5: {}}", "entry 1: '5' where a text"),
    ("{{}: {}}", "entry 1: a key is no text"),
    ('{"5": {}} more', "entry 1: something follows the object"),
    ('{"5": ' + '{"a":' * 100_000, "entry 1: (too deeply nested|Expecting)"),
]


def refused(path: Path, read: Callable[[Path], Iterable[object]], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(read(path))
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


@pytest.mark.parametrize(("value", "message"), MISTAKES)
def test_questions_of_another_form_are_refused(write_json: WriteJson, value: object, message: str) -> None:
    refused(write_json("questions.json", value), read_gqa, message)


@pytest.mark.parametrize(("text", "message"), DAMAGE)
def test_damaged_files_are_refused(write_json: WriteJson, text: str, message: str) -> None:
    refused(write_json("questions.json", text), read_entries, message)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the file '.*none.json' \(No such file"):
        list(read_entries(tmp_path / "none.json"))
    (tmp_path / "latin.json").write_bytes('{"é": {}}'.encode("latin-1"))
    with pytest.raises(DataError, match="no UTF-8"):
        list(read_entries(tmp_path / "latin.json"))
    (tmp_path / "empty.json").touch()
    assert count_gqa(tmp_path / "empty.json") is count_gqa(tmp_path / "none.json") is None


leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=12)
values = st.text(max_size=12) | st.dictionaries(
    st.text(max_size=5), st.recursive(leaves, lambda inner: st.lists(inner, max_size=3), max_leaves=4), max_size=4
)


@given(st.dictionaries(st.text(max_size=8), values, max_size=6), st.sampled_from([None, 1]), st.integers(1, 9))
def test_entries_are_those_of_the_whole_whatever_the_chunks(
    tmp_path_factory: pytest.TempPathFactory, value: dict[str, object], indent: int | None, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("entries") / "value.json"
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scanner, "_CHUNK", chunk)
        assert dict(read_entries(path)) == value


def test_memory_does_not_grow_with_the_file(write_json: WriteJson) -> None:
    record = {"imageId": "n1", "question": "What is it?", "answer": "pipe", "more": "x" * 1000}
    path = write_json("questions.json", {str(number): record for number in range(20_000)})
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_gqa(path)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def test_a_damaged_file_is_not_read_whole(write_json: WriteJson, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanner, "_CHUNK", 1000)
    monkeypatch.setattr(scanner, "_LONGEST", 10_000)
    path = write_json("questions.json", '{"5": {"question": "' + "x" * 100_000)
    with path.open(encoding="utf-8") as file:
        with pytest.raises(DataError, match="Unterminated string"):
            list(scanner._Scanner(file, path).entries())
        assert len(file.read()) > 50_000  # what was not read


def test_a_file_may_begin_with_a_mark_but_not_name_a_field_twice(write_json: WriteJson) -> None:
    text = '{"5": {"imageId": "n1", "question": "What?", "answer": "a "}}'
    (example,) = read_gqa(write_json("questions.json", "\ufeff" + text))
    assert example.fields["answer"] == "a"
    refused(write_json("questions.json", text.replace("}}", ', "answer": "b"}}')), read_gqa, "'answer' occurs twice")
