"""``villa_validate`` from its arguments to its exit code."""

import configparser
import json
import subprocess
import sys
from pathlib import Path

import pytest

from villa.cli.validate import main

ENTRIES = [{"question_id": number, "answer": "yes"} for number in range(3)]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A valid file in the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    Path("vqa.json").write_text(json.dumps(ENTRIES))
    return "vqa.json"


def test_a_valid_file_is_one_line(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("ids.txt").write_text("2\n1\n0\n")
    assert main([file, "--task", "vqa", "--ids", "ids.txt"]) == 0
    assert capsys.readouterr() == ("vqa.json: 3 entries, valid vqa submission\n", "")
    assert main(["--task=vqa", file]) == 0
    line = "vqa.json: 3 entries, valid vqa submission (ids checked for form and uniqueness only)\n"
    assert capsys.readouterr() == (line, "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--task", "vqa"], "the following arguments are required: PATH; villa_validate --help shows the usage"),
        (["vqa.json"], "'vqa.json' is no run, checkpoint, saved folder or file of weights; a submission needs --task"),
        (["no.json"], "'no.json' does not exist; mend the path"),
        (["vqa.json", "--task", "nlvr"], "no submission is called 'nlvr'; did you mean 'nlvr2'? (known: "),
        (["vqa.json", "--task", "vqa", "--id", "x"], "unrecognized arguments: --id x"),
        (["vqa.json", "--task", "gqa"], "vqa.json entry 1 has no 'questionId' (it has 'question_id', 'answer')"),
        (["vqa.json", "--task", "vcr"], "'vqa.json' must end in .csv; a vcr submission is a CSV file with a header"),
        (["no.json", "--task", "vqa"], "cannot read 'no.json' (No such file or directory); mend the path"),
        (["no\nno.json", "--task", "vqa"], "cannot read 'no\\nno.json'"),
        (["vqa.json", "--task", "vqa", "--ids", "no"], "cannot read 'no' (No such file or directory)"),
        (["vqa.json", "--task", "vqa", "--ids", "vqa.db"], "vqa.json lacks 1 of 4 expected ids, first '7'"),
        (["vqa.json", "--task", "vqa", "--user-dir", "none"], "user_dir 'none' does not exist"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    args: list[str], message: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("vqa.db").mkdir()
    Path("vqa.db/id2len.json").write_text('{"7": 5, "0": 3, "1": 3, "2": 3}')
    assert main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("villa_validate: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


PLUGIN = """
from villa import register_submission
from villa.evaluation.submissions.gqa import GqaSubmission

@register_submission("my_task")
class MySubmission(GqaSubmission):
    "The GQA form under another name."

    name = "my_task"
"""


def test_a_format_of_ones_own(tmp_path: Path) -> None:
    """In a process of its own, so that nothing stays registered; nothing slow is imported."""
    (tmp_path / "my_formats.py").write_text(PLUGIN)
    (tmp_path / "file.json").write_text('[{"questionId": "1", "prediction": "yes"}]')
    code = (
        "import sys; from villa.cli.validate import main; "
        "code = main(['file.json', '--task', 'my_task', '--user-dir', 'my_formats.py']); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("file.json: 1 entries, valid my_task submission")


def test_the_command_is_installed(root: Path) -> None:
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg")
    assert "villa_validate = villa.cli.validate:main" in setup["options.entry_points"]["console_scripts"].splitlines()


def test_help_is_for_those_who_ask(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["--help"])
    assert leave.value.code == 0
    assert "villa_run --list submissions" in capsys.readouterr().out
