"""No file makes a validator fail otherwise than by one line: random bytes, random JSON, damaged valid files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from submission_cases import IDS, submission, write_submission

from villa.errors import DataError
from villa.evaluation.submissions.base import read_ids
from villa.registry import SUBMISSIONS

TASKS = SUBMISSIONS.names()
JSON_TASKS = [name for name in TASKS if SUBMISSIONS.get(name).suffix == ".json"]

FIXED = settings(derandomize=True, database=None, max_examples=60)
WORDS = st.sampled_from(
    ["question_id", "answer", "questionId", "prediction", "id", "label", "sent_id", "box", "\ud800"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400) | WORDS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4), max_leaves=6
)


def check_message(error: DataError) -> None:
    assert len(str(error).splitlines()) == 1


@pytest.fixture
def check(tmp_path: Path) -> Callable[[str, bytes], None]:
    """Validate a file of these bytes, with and without ids; it must be valid or wrong in one line."""

    def check(task: str, content: bytes) -> None:
        file = tmp_path / f"file{submission(task).suffix}"
        file.write_bytes(content)
        for ids in (None, IDS[task]):
            try:
                report = submission(task).validate(file, ids)
            except DataError as error:
                check_message(error)
            else:
                assert report.entries > 0

    return check


@pytest.mark.parametrize("task", TASKS)
@FIXED
@given(content=st.binary(max_size=200))
def test_random_bytes(task: str, check: Callable[[str, bytes], None], content: bytes) -> None:
    check(task, content)


@pytest.mark.parametrize("task", JSON_TASKS)
@FIXED
@given(value=st.lists(VALUES, max_size=3) | VALUES)
def test_random_json(task: str, check: Callable[[str, bytes], None], value: object) -> None:
    check(task, json.dumps(value).encode())


@pytest.mark.parametrize("task", TASKS)
@FIXED
@given(data=st.data())
def test_damaged_files(task: str, check: Callable[[str, bytes], None], tmp_path: Path, data: st.DataObject) -> None:
    """Some bytes of a valid file are replaced, left out or doubled."""
    file = tmp_path / f"{task}{submission(task).suffix}"
    content = bytearray(file.read_bytes() if file.exists() else write_submission(tmp_path, task).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content) - 1))
        length = data.draw(st.sampled_from([1, 1, 1, 2, 8, 100]))
        piece = bytes(content[start : start + length])
        content[start : start + length] = data.draw(st.binary(max_size=3) | st.just(b"") | st.just(piece * 2))
        if not content:
            break
    check(task, bytes(content))


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".txt"])
@FIXED
@given(content=st.binary(max_size=100) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_lists_of_ids(suffix: str, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / f"ids{suffix}"
    file.write_bytes(content)
    try:
        assert read_ids(file)
    except DataError as error:
        check_message(error)
