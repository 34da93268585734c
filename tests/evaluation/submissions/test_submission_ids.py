"""Ids of a split, from everything that ``--ids`` takes."""

from pathlib import Path

import pytest

from villa.errors import DataError
from villa.evaluation.submissions.base import IdCheck, read_ids


@pytest.mark.parametrize(
    ("name", "text", "ids"),
    [
        ("ids.txt", "b\n\n a \nb\n", ["b", "a"]),
        ("ids", "1\r\n2", ["1", "2"]),
        ("ids.json", '["b", 7, "b"]', ["b", "7"]),
        ("ids.json", '{"b": 3, "a": 4}', ["b", "a"]),
        ("ids.json", '[{"question_id": 7, "question": "?"}]', ["7"]),
        ("ids.json", '{"info": {}, "questions": [{"question_id": 7}, {"question_id": 8}]}', ["7", "8"]),
        ("ids.jsonl", '{"id": "x"}\n\n{"question_id": 7}\n', ["x", "7"]),
        ("ids.jsonl", '{"annot_id": "test-0"}\n{"identifier": "test1-0-0-0"}\n', ["test-0", "test1-0-0-0"]),
        ("ids.jsonl", '{"questionId": "7"}\n{"sent_id": 8}', ["7", "8"]),
    ],
)
def test_ids_are_read_in_order_and_once(name: str, text: str, ids: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert read_ids(tmp_path / name) == ids


@pytest.mark.parametrize("name", ["id2len.json", "id2len_qa.json"])
def test_a_text_database_has_the_ids_of_its_lengths(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"q2": 12, "q1": 9}')
    assert read_ids(tmp_path) == ["q2", "q1"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ids.txt", " \n", "holds no id"),
        ("ids.json", "[]", "holds no id"),
        ("ids.json", "7", "is a JSON int; a list or an object is needed"),
        ("ids.json", "[", "ids.json is not JSON"),
        ("ids.json", "[" * 100_000, "ids.json is not JSON (RecursionError"),
        ("ids.json", "[1.5]", "ids.json element 1 has no id"),
        ("ids.json", "[true]", "element 1 has no id"),
        ("ids.jsonl", '{"id": "x"}\n{"name": "y"}', "ids.jsonl line 2 has no id; it must be one, or a record with one"),
        ("ids.jsonl", '{"id": ""}', "ids.jsonl line 1 has no id"),
        ("ids.jsonl", "x\n", "ids.jsonl line 1 is not JSON"),
    ],
)
def test_files_without_ids_are_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as error:
        read_ids(tmp_path / name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_binary_files_and_other_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"it holds neither id2len.json nor id2len_qa.json"):
        read_ids(tmp_path)
    with pytest.raises(DataError, match="No such file or directory"):
        read_ids(tmp_path / "none.json")
    with pytest.raises(DataError, match="cannot read"):
        read_ids(Path("a\0b"))
    (tmp_path / "ids").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_ids(tmp_path / "ids")


def test_a_check_counts_what_is_missing(tmp_path: Path) -> None:
    check = IdCheck([str(number) for number in range(5000)])
    check.add("3", "line 1")
    with pytest.raises(DataError, match="file lacks 4,999 of 5,000 expected ids, first '0'"):
        check.finish(Path("file"))
    with pytest.raises(DataError, match="line 2 repeats id '3'"):
        check.add("3", "line 2")
    assert len(check) == 1
