"""What all formats share: predictions become files that the validator accepts, and nothing else does."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from submission_cases import IDS, PREDICTIONS, problem, submission, write_predictions, write_submission

from villa.errors import DataError
from villa.evaluation.submissions.base import Report
from villa.registry import SUBMISSIONS

TASKS = SUBMISSIONS.names()


def test_every_format_is_tested_and_goes_by_its_name() -> None:
    assert set(TASKS) == {"gqa", "nlvr2", "referring", "retrieval", "snli_ve", "vcr", "vqa"} == set(PREDICTIONS)
    assert all(SUBMISSIONS.get(name).name == name for name in TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_written_files_are_valid(task: str, tmp_path: Path) -> None:
    predictions = write_predictions(tmp_path, PREDICTIONS[task])
    output = tmp_path / "new" / f"file{submission(task).suffix}"
    assert submission(task).write(predictions, output) == 2
    assert list(output.parent.iterdir()) == [output]
    report = submission(task).validate(output, IDS[task])
    assert (report.task, report.entries, report.compared) == (task, 2, True)
    assert not submission(task).validate(output).compared


@pytest.mark.parametrize("task", TASKS)
def test_ids_that_are_missing_or_unknown_are_named(task: str, tmp_path: Path) -> None:
    file = write_submission(tmp_path, task)
    more = problem(task, file, [*IDS[task], "first", "second"])
    assert "lacks 2 of 4 expected ids, first 'first'" in more
    fewer = problem(task, file, IDS[task][:1])
    assert f"has id {IDS[task][1]!r}, which is not among the 1 expected ids" in fewer


@pytest.mark.parametrize("task", TASKS)
def test_another_ending_is_refused(task: str, tmp_path: Path) -> None:
    file = write_submission(tmp_path, task).rename(tmp_path / "file.txt")
    assert f"must end in {submission(task).suffix}" in problem(task, file)
    with pytest.raises(DataError, match="must end in"):
        submission(task).write(write_predictions(tmp_path, PREDICTIONS[task]), tmp_path / "other.txt")


@pytest.mark.parametrize("task", TASKS)
def test_a_file_that_is_missing_a_folder_or_cut_short_is_one_line(task: str, tmp_path: Path) -> None:
    file = write_submission(tmp_path, task)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])
    assert problem(task, file)
    file.write_bytes(b"")
    assert problem(task, file)
    file.unlink()
    assert "No such file or directory" in problem(task, file)
    file.mkdir()
    assert "it is a folder, not a file" in problem(task, file)


@pytest.mark.parametrize("task", TASKS)
def test_damaged_predictions_leave_the_older_file(task: str, tmp_path: Path) -> None:
    predictions = write_predictions(tmp_path, [*PREDICTIONS[task], {"id": "9", "answer": 1.5}])
    output = tmp_path / f"file{submission(task).suffix}"
    output.write_text("old")
    with pytest.raises(DataError, match=r"predictions.jsonl line \d has answer=1.5"):
        submission(task).write(predictions, output)
    assert output.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == sorted([output, predictions])


@pytest.mark.parametrize("task", TASKS)
def test_no_predictions_and_no_room_are_one_line(task: str, tmp_path: Path) -> None:
    output = tmp_path / f"file{submission(task).suffix}"
    with pytest.raises(DataError, match="holds no"):
        submission(task).write(write_predictions(tmp_path, []), output)
    assert not output.exists()
    (tmp_path / "taken").write_text("a file, not a folder")
    predictions = write_predictions(tmp_path, PREDICTIONS[task])
    with pytest.raises(DataError, match="cannot turn"):
        submission(task).write(predictions, tmp_path / "taken" / output.name)


#: Predictions that do not have what the format needs, with a part of the message.
UNFIT: list[tuple[str, dict[str, Any], str]] = [
    ("vqa", {"id": "q7"}, "line 1 has 'id' = 'q7'; it must be a whole number"),
    ("vqa", {"id": "07"}, "'id' = '07'"),
    ("vqa", {"id": "\u0667"}, "'id' = '\u0667'"),
    ("vqa", {"id": "9" * 5000}, "it must be a whole number"),
    ("vqa", {"answer": 3}, "has 'answer' = 3; it must be the text of an answer"),
    ("gqa", {"answer": 3}, "has 'answer' = 3"),
    ("snli_ve", {"answer": "maybe"}, "it must be contradiction, entailment or neutral"),
    ("nlvr2", {"answer": "true"}, "predicts 'true'; it must be True or False"),
    ("nlvr2", {"answer": 1}, "predicts '1'"),
    ("nlvr2", {"id": "a,b", "answer": "True"}, "has identifier 'a,b'"),
    ("vcr", {}, "has no 'probabilities' (it has 'score', 'id', 'answer'); add 20 numbers"),
    ("vcr", {"probabilities": [0.25] * 19}, "it must be 20 numbers"),
    ("vcr", {"probabilities": [0.25] * 19 + ["0.25"]}, "it must be 20 numbers"),
    ("vcr", {"probabilities": [0.25] * 19 + [0.3]}, "rationale_conditioned_on_a3_0 to rationale_conditioned_on_a3_3"),
    ("vcr", {"probabilities": [-0.5, 0.5, 0.5, 0.5] * 5}, "column answer_0 is '-0.5'"),
    ("vcr", {"id": "a\nb", "probabilities": [0.25] * 20}, "has annot_id 'a\\nb'"),
    ("referring", {"box": [0, 0, 1]}, "it must be [x, y, width, height]"),
    ("referring", {"box": [0, 0, 1, 0]}, "it must be [x, y, width, height]"),
    ("referring", {"box": [10**400, 0, 1, 1]}, "it must be [x, y, width, height]"),
    ("referring", {"id": "one", "box": [0, 0, 1, 1]}, "'id' = 'one'"),
]


@pytest.mark.parametrize(("task", "change", "message"), UNFIT)
def test_predictions_of_the_wrong_form_are_named(
    task: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    predictions = write_predictions(tmp_path, [{"id": "1", "answer": "x", **change}])
    output = tmp_path / f"file{submission(task).suffix}"
    with pytest.raises(DataError) as error:
        submission(task).write(predictions, output)
    assert message in str(error.value)
    assert str(predictions) in str(error.value)
    assert not output.exists()


def test_files_are_written_as_a_stream(tmp_path: Path) -> None:
    """Of 3,000 predictions of 4,000 characters, no more is held than the ids and a piece of the file."""
    predictions = tmp_path / "predictions.jsonl"
    with predictions.open("w") as file:
        for number in range(3_000):
            file.write(json.dumps({"id": str(number), "answer": "long " * 800, "score": 0}) + "\n")
    tracemalloc.start()
    assert submission("gqa").write(predictions, tmp_path / "gqa.json") == 3_000
    assert submission("gqa").validate(tmp_path / "gqa.json").entries == 3_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "gqa.json").stat().st_size > 12_000_000
    assert peak < 7_000_000


def test_a_report_is_a_line() -> None:
    assert str(Report("vcr", 25263, compared=True)) == "25,263 entries, valid vcr submission"
    assert str(Report("vqa", 2, compared=False, detail="both fine")) == (
        "2 entries, valid vqa submission (both fine; ids checked for form and uniqueness only)"
    )
