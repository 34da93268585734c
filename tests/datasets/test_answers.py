"""Lists of answers: what stands in them is the labels, whatever program wrote them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from villa.datasets.base import answer_list, plain_answer, read_answer_list, read_answers
from villa.errors import DataError


def listed(path: Path, contents: bytes) -> list[str]:
    path.write_bytes(contents)
    return read_answer_list(path)


@pytest.mark.parametrize(
    ("contents", "answers"),
    [
        (b"yes\nno\n", ["yes", "no"]),
        (b"yes\nno", ["yes", "no"]),
        (b"\xef\xbb\xbfyes\r\nno\r\n", ["yes", "no"]),
        (b" yes \n\tno\n", ["yes", "no"]),
        (b"yes\nno\n\n \n\r\n", ["yes", "no"]),
        (b"\nno\nyes\n", ["", "no", "yes"]),
        (b"no\n  \nyes\n\n", ["no", "", "yes"]),
        (b"no\n\nyes\n\nmaybe\n", ["no", "yes", "maybe"]),
        (
            "a\u0085b\nc\u2028d\x0be\x0cf\x1cg\nYes\nyes\n".encode(),
            ["a\u0085b", "c\u2028d\x0be\x0cf\x1cg", "Yes", "yes"],
        ),
    ],
)
def test_one_answer_a_line(tmp_path: Path, contents: bytes, answers: list[str]) -> None:
    assert listed(tmp_path / "answers.txt", contents) == answers


def test_what_empty_lines_are_taken_for_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    listed(tmp_path / "a.txt", b"no\n\nyes\n")
    assert "a.txt:2: the empty line is taken for the empty answer" in caplog.text
    listed(tmp_path / "b.txt", b"no\n\nyes\n\nmaybe\n")
    assert "b.txt: 2 empty lines are passed over" in caplog.text


@pytest.mark.parametrize("value", [["b ", "", "a"], {"a": 2, "b": 0, "": 1}])
def test_json_holds_a_list_or_labels(tmp_path: Path, value: object) -> None:
    text = json.dumps(value)
    assert listed(tmp_path / "a.json", text.encode()) == ["b", "", "a"]
    assert listed(tmp_path / "a.json", b"\xef\xbb\xbf" + text.encode()) == ["b", "", "a"]
    assert listed(tmp_path / "a.json", text.encode("utf-16")) == ["b", "", "a"]  # as it always was


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.txt", b"\n\n", "is empty"),
        ("a.txt", b"yes\nno\nyes \n", "repeats 'yes'"),
        ("a.txt", b"yes\rno\r", "end them with line feeds"),
        ("a.txt", b"yes\ncaf\xe9\n", r"is not UTF-8 text \(byte 0xe9 in line 2\); save it as UTF-8"),
        ("a.txt", "yes\nno\n".encode("utf-16"), r"is not UTF-8 text \(byte 0xff in line 1\)"),
        ("a.json", b'["yes", "no", "yes"]', "repeats 'yes'"),
        ("a.json", b'["yes", "yes "]', "repeats 'yes'"),
        ("a.json", b'{"yes": 0,\n "yes": 1}', "'yes' occurs twice in one object, again in line 2"),
        ("a.json", b'{"yes": NaN}', "must give the labels 0 to 0"),
        ("a.json", b'{"yes": 1}', "must give the labels 0 to 0"),
        ("a.json", b"[]", "holds no answers"),
        ("a.json", b"yes\nno\n", "is not valid JSON"),
    ],
)
def test_bad_lists_are_one_line(tmp_path: Path, name: str, contents: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as told:
        listed(tmp_path / name, contents)
    assert "\n" not in str(told.value)
    with pytest.raises(DataError, match="cannot read the"):
        read_answer_list(tmp_path / f"none{Path(name).suffix}")


def test_a_released_list_keeps_its_answers_to_the_letter(tmp_path: Path) -> None:
    (tmp_path / "ans2label.json").write_text('{"yes ": 1, "yes": 0}')
    assert read_answers(tmp_path / "ans2label.json") == ["yes", "yes "]


LABELS = st.lists(st.text(max_size=4).map(plain_answer), min_size=1, max_size=6, unique=True)


@given(answers=LABELS)
def test_what_is_written_is_read(tmp_path: Path, answers: list[str]) -> None:
    for path in (tmp_path / "a.json", tmp_path / "a.txt"):
        broken = answers[-1] == "" or any(set("\r\n") & set(answer) for answer in answers)
        if path.suffix == ".txt" and broken:
            with pytest.raises(DataError, match=r"give it a name that ends in \.json"):
                answer_list(path, answers)
        else:
            path.write_bytes(answer_list(path, answers).encode())
            assert read_answer_list(path) == answers
