"""Formats that are a table: what is written, and what the validator says of files of other origin."""

import csv
from pathlib import Path

import pytest
from submission_cases import PROBABILITIES, problem, submission, write_submission

#: As the leaderboard lists them.
VCR_COLUMNS = [
    "annot_id",
    "answer_0",
    "answer_1",
    "answer_2",
    "answer_3",
    "rationale_conditioned_on_a0_0",
    "rationale_conditioned_on_a0_1",
    "rationale_conditioned_on_a0_2",
    "rationale_conditioned_on_a0_3",
    "rationale_conditioned_on_a1_0",
    "rationale_conditioned_on_a1_1",
    "rationale_conditioned_on_a1_2",
    "rationale_conditioned_on_a1_3",
    "rationale_conditioned_on_a2_0",
    "rationale_conditioned_on_a2_1",
    "rationale_conditioned_on_a2_2",
    "rationale_conditioned_on_a2_3",
    "rationale_conditioned_on_a3_0",
    "rationale_conditioned_on_a3_1",
    "rationale_conditioned_on_a3_2",
    "rationale_conditioned_on_a3_3",
]
HEADER = ",".join(VCR_COLUMNS)
ROW = "test-0" + ",0.25" * 20


def test_vcr_has_the_columns_of_the_leaderboard(tmp_path: Path) -> None:
    with write_submission(tmp_path, "vcr").open(newline="") as file:
        table = csv.DictReader(file)
        rows = list(table)
    assert table.fieldnames == VCR_COLUMNS
    assert [row["annot_id"] for row in rows] == ["test-0", "test-1"]
    assert [float(rows[1][column]) for column in VCR_COLUMNS[1:]] == PROBABILITIES


def test_nlvr2_is_read_by_splitting_at_the_comma(tmp_path: Path) -> None:
    lines = write_submission(tmp_path, "nlvr2").read_text().splitlines()
    assert dict(line.strip().split(",") for line in lines) == {"test1-0-0-1": "True", "test1-0-1-1": "False"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no entry"),
        (HEADER, "holds no entry"),
        (f"{ROW}\n{HEADER}\n", "line 1: column 1 is 'test-0', not annot_id; the first line must hold the 21 names"),
        (HEADER.replace("a2_1", "a2_l"), "line 1: column 15 is 'rationale_conditioned_on_a2_l', not rationale_cond"),
        (HEADER.removesuffix(f",{VCR_COLUMNS[-1]}"), "column 21 is missing, not rationale_conditioned_on_a3_3"),
        (f"{HEADER},more\n{ROW},1\n", "column 22 is 'more', not nothing"),
        (f"{HEADER}\n{ROW},0\n", "line 2 has 22 columns; a vcr submission has 21"),
        (f"{HEADER}\n{ROW}\n\n", "line 3 has 0 columns"),
        (f"{HEADER}\n{ROW}\n{ROW}\n", "line 3 repeats id 'test-0'"),
        (f"{HEADER}\n,{ROW[7:]}\n", "line 2 has annot_id ''"),
        (f'{HEADER}\n"test-0"{ROW[6:]}\n', "line 2 has annot_id '\"test-0\"'"),
        (f"{HEADER}\n{ROW[:-4]}nan\n", "line 2: column rationale_conditioned_on_a3_3 is 'nan'; it must be a number in"),
        (f"{HEADER}\n{ROW[:-4]}\n", "column rationale_conditioned_on_a3_3 is ''"),
        (f"{HEADER}\n{ROW[:-4]}1e400\n", "is '1e400'"),
        (f"{HEADER}\n{ROW[:-4]}0_1\n", "is '0_1'"),
        (f"{HEADER}\n{ROW[:-4]}\u0660.25\n", "is '\u0660.25'"),
        (f"{HEADER}\n{ROW[:-4]}1.5\n", "is '1.5'"),
        (f"{HEADER}\n{ROW[:-4]}0.252\n", "columns rationale_conditioned_on_a3_0 to rationale_conditioned_on_a3_3 sum"),
        (f"{HEADER}\n{'x' * 200_000}{ROW}\n", "line 2 cannot be read"),
    ],
)
def test_a_wrong_vcr_table_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "file.csv"
    file.write_text(text, encoding="utf-8")
    assert message in problem("vcr", file)


def test_rounded_probabilities_and_windows_line_ends_are_valid(tmp_path: Path) -> None:
    file = tmp_path / "file.csv"
    file.write_text(f"{HEADER}\r\n{ROW[:-4]}0.2504\r\n", newline="")
    assert submission("vcr").validate(file).entries == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("identifier,prediction\ntest1-0-0-1,True\n", "line 1 predicts 'prediction'; it must be True or False"),
        ("a,True\nb,true\n", "line 2 predicts 'true'"),
        ("a,True\nb\n", "line 2 has 1 columns; a nlvr2 submission has 2"),
        ("a,True\na,False\n", "line 2 repeats id 'a'"),
        ('"a",True\n', "line 1 has identifier '\"a\"'"),
        (" a,True\n", "line 1 has identifier ' a'"),
    ],
)
def test_a_wrong_nlvr2_table_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "file.csv"
    file.write_text(text)
    assert message in problem("nlvr2", file)
