"""Formats that are a JSON list: what is written, and what the validator says of files of other origin."""

import json
from pathlib import Path
from typing import Any

import pytest
from submission_cases import problem, submission, write_submission

from villa.evaluation.submissions.base import read_objects


@pytest.mark.parametrize(
    ("task", "entries"),
    [
        ("vqa", [{"question_id": 262144000, "answer": "café"}, {"question_id": 0, "answer": ""}]),
        ("gqa", [{"questionId": "07354", "prediction": "on the left"}, {"questionId": "x1", "prediction": "no"}]),
        ("snli_ve", [{"id": "4.jpg#0r1e", "label": "entailment"}, {"id": "2", "label": "neutral"}]),
        ("referring", [{"sent_id": 17, "box": [0, 1.5, 20, 0.25]}, {"sent_id": 18, "box": [1, 1, 1, 1]}]),
    ],
)
def test_the_file_is_what_the_grader_reads(task: str, entries: list[dict[str, Any]], tmp_path: Path) -> None:
    assert json.loads(write_submission(tmp_path, task).read_bytes()) == entries


VQA = {"question_id": 1, "answer": "yes"}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("vqa", {"question_id": "7"}, "entry 2 has 'question_id' = '7'; it must be a whole number"),
    ("vqa", {"question_id": True}, "'question_id' = True"),
    ("vqa", {"question_id": -1}, "'question_id' = -1"),
    ("vqa", {"question_id": 7.0}, "'question_id' = 7.0"),
    ("vqa", {"question_id": 1}, "entry 2 repeats id '1'"),
    ("vqa", {"question_id": 2, "answer": None}, "'answer' = None; it must be a text"),
    ("gqa", {"questionId": 7}, "'questionId' = 7; it must be a text"),
    ("gqa", {"questionId": ""}, "'questionId' = ''"),
    ("gqa", {"questionId": "7", "prediction": ["yes"]}, "'prediction' = ['yes']"),
    ("snli_ve", {"id": "7", "label": "Neutral"}, "'label' = 'Neutral'; it must be contradiction, entailment or"),
    ("snli_ve", {"id": "7", "label": ["neutral"]}, "'label' = ['neutral']"),
    ("referring", {"sent_id": 7, "box": [0, 0, 1, -1]}, "'box' = [0, 0, 1, -1]"),
    ("referring", {"sent_id": 7, "box": [0, 0, "1", 1]}, "'box'"),
    ("referring", {"sent_id": 7, "box": {"x": 1}}, "'box'"),
]
RIGHT: dict[str, dict[str, Any]] = {
    "vqa": VQA,
    "gqa": {"questionId": "1", "prediction": "yes"},
    "snli_ve": {"id": "1", "label": "neutral"},
    "referring": {"sent_id": 1, "box": [-3.5, 0, 10, 10], "more": "is allowed"},
}


@pytest.mark.parametrize(("task", "change", "message"), WRONG)
def test_a_wrong_entry_is_named(task: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text(json.dumps([RIGHT[task]]))
    assert submission(task).validate(file).entries == 1
    file.write_text(json.dumps([RIGHT[task], {**RIGHT[task], **change}]))
    assert message in problem(task, file)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text('[{"question_id": 1, "anwser": "yes"}]')
    assert "entry 1 has no 'answer' (it has 'question_id', 'anwser')" in problem("vqa", tmp_path / "file.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a JSON list"),
        ("{}", "is not a JSON list"),
        ('{"question_id": 1, "answer": "yes"}\n', "is not a JSON list"),
        ("[]", "holds no entry"),
        ("[1]", "entry 1 is not a JSON object"),
        (f"[{json.dumps(VQA)},]", "entry 2 is not a JSON object"),
        (f"[{json.dumps(VQA)}", "entry 1 is not followed by ',' or ']'; is the file complete?"),
        (f"[{json.dumps(VQA)} {json.dumps(VQA)}]", "entry 1 is not followed by"),
        (f"[{json.dumps(VQA)}] []", "goes on after the end"),
        ('[{"question_id": 1, "answer": "ye', "entry 1 is not valid JSON (Unterminated string"),
        ('[{"question_id": NaN, "answer": ""}]', "entry 1 is not valid JSON (NaN is no JSON number)"),
        ('[{"question_id": 1' + "0" * 5000 + "}]", "entry 1 is not valid JSON"),
        ('[{"a":' * 60_000, "entry 1 is not valid JSON"),
        ('[{"answer": "' + "x" * 3_000_000, "entry 1 is not valid JSON"),
        ("\ufeff[]", "is not a JSON list"),
    ],
)
def test_a_file_that_is_no_list_of_objects_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text(text, encoding="utf-8")
    assert message in problem("vqa", file)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(json.dumps([VQA]).encode().replace(b"yes", b"\xff"))
    assert "is not UTF-8 text" in problem("vqa", file)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("length", [20, 1_000, 500_000])
def test_objects_are_read_whole_wherever_the_pieces_end(indent: int | None, length: int, tmp_path: Path) -> None:
    entries = [{"id": number, "text": 'é"]}[{,' * (length // 8), "deep": [[{"a": [1.5]}]]} for number in range(9)]
    file = tmp_path / "file.json"
    file.write_text(json.dumps(entries, indent=indent, ensure_ascii=False) + "\n \n")
    assert [entry for _, entry in read_objects(file, "test")] == entries
