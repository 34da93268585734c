from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from villa.errors import DataError
from villa.evaluation.predictions import PredictionWriter, read_predictions


def test_what_is_written_reads_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / "predictions_test.jsonl"
    with PredictionWriter(path) as writer:
        writer.write(["b", "a"], [{"answer": "blau ä", "score": 0.25}, {"answer": 3, "score": 1}])
        assert not path.exists()
        writer.write(["c"], [{"answer": "", "score": -1.5, "logits": [1.0, 2.0]}])
    assert list(read_predictions(path)) == [
        {"id": "b", "answer": "blau ä", "score": 0.25},
        {"id": "a", "answer": 3, "score": 1},
        {"id": "c", "answer": "", "score": -1.5, "logits": [1.0, 2.0]},
    ]
    assert [p.name for p in path.parent.iterdir()] == ["predictions_test.jsonl"]


def test_an_error_leaves_the_older_file_and_no_rubbish(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("old")

    def interrupted() -> None:
        with PredictionWriter(path) as writer:
            writer.write(["a"], [{"answer": "x", "score": 1.0}])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    with PredictionWriter(tmp_path / "p.jsonl") as writer:
        writer.write(["warm"], [{"answer": "x", "score": 1.0}])
        tracemalloc.start()
        for index in range(5000):
            writer.write([str(index)], [{"answer": "an answer " * 20, "score": 0.5}])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert (tmp_path / "p.jsonl").stat().st_size > 1_000_000
    assert peak < 200_000


@pytest.mark.parametrize(
    ("id_", "answer", "found"),
    [
        ("", {"answer": "x", "score": 1.0}, "id=''"),
        ("a", {"score": 1.0}, "answer=None"),
        ("a", {"answer": True, "score": 1.0}, "answer=True"),
        ("a", {"answer": "x", "score": float("nan")}, "score=nan"),
        ("a", {"answer": 1.5, "score": "high"}, "answer=1.5, score='high'"),
    ],
)
def test_an_answer_of_the_wrong_form_is_not_written(
    tmp_path: Path, id_: str, answer: dict[str, Any], found: str
) -> None:
    with pytest.raises(DataError) as error, PredictionWriter(tmp_path / "p.jsonl") as writer:
        writer.write([id_], [answer])
    assert found in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_as_many_answers_as_ids_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zip"), PredictionWriter(tmp_path / "p.jsonl") as writer:
        writer.write(["a", "b"], [{"answer": "x", "score": 1.0}])


GOOD = json.dumps({"id": "a", "answer": "x", "score": 1.0})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 is not JSON \('\{'\)"),
        ("", "line 2 is not JSON"),
        ("[1]", "line 2 is a list, not an object"),
        ('{"id": 7, "answer": "x", "score": 1}', "line 2 has id=7"),
        ('{"id": "b", "answer": "x", "score": NaN}', "line 2 has score=nan"),
        (GOOD, "line 2 predicts 'a' a second time"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(DataError, match=message) as error:
        list(read_predictions(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_binary_rubbish_and_a_missing_file_are_errors(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="line 1 is not JSON"):
        list(read_predictions(tmp_path / "p.jsonl"))
    with pytest.raises(DataError, match="does not exist; write one with run_type=predict"):
        list(read_predictions(tmp_path / "none.jsonl"))
