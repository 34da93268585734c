"""``villa_validate`` from its arguments to its exit code."""

import configparser
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from villa.cli.validate import main
from villa.datasets.cache import FeatureCache
from villa.datasets.lxmert.features import write_line
from villa.datasets.uniter.box_selection import BoxSelection
from villa.datasets.uniter.writers import ImageDatabaseWriter, TextDatabaseWriter

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
        (["vqa.json"], "'vqa.json' is no data, no features and no trained model; a submission needs --task"),
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
from villa.evaluation.submissions.tasks import GqaSubmission

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


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Databases and feature files that the package's writers made, in the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path / "cache"))
    boxes = np.array([[0, 0.25, 0.5, 1, 0.5, 0.75]] * 3, np.float32)
    features, sure = np.ones((3, 4), np.float32), np.full(3, 0.5, np.float32)
    with ImageDatabaseWriter(tmp_path / "images", BoxSelection()) as images:
        images.add("a.npz", features, boxes, sure)
    with TextDatabaseWriter(tmp_path / "text.db", {"CLS": 1, "SEP": 2, "MASK": 3, "v_range": [4, 9]}) as texts:
        texts.add("1", {"input_ids": [5, 6]}, 2, "a.npz")
    (tmp_path / "files").mkdir()
    np.savez(tmp_path / "files" / "a.npz", features=features, boxes=boxes)
    pixels = boxes[:, :4] * [640, 480, 640, 480]
    (tmp_path / "a.tsv").write_bytes(write_line("a", (480, 640), features, pixels, sure))
    cache = FeatureCache(tmp_path / "grid", (3, 2, 4), {"extractor": "none"})
    cache.missing([0])
    cache.write(0, np.ones((3, 2, 4), np.float16))
    return tmp_path


PLACES = {
    "images": "images: feat_th0.2_max100_min10: 1 images, valid image database, as it was written",
    "text.db": "text.db: 1 examples, valid text database, as it was written",
    "files": "files: 1 images, valid region features",
    "files/a.npz": "files/a.npz: 1 images, valid region features",
    "a.tsv": "a.tsv: 1 images, valid region features",
    "grid": "grid: feature cache of 1 parts, as they were written",
}


@pytest.mark.parametrize("place", PLACES)
def test_data_are_read_through(made: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([place]) == 0
    assert capsys.readouterr().out == f"{PLACES[place]}\n"


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("sure", "message"),
    [
        ([0.5, 0.2, 0.0], ""),
        ([0.5, float("nan"), 0.0], "the confidence of box 2 is nan; it must be within [0, 1]"),
        ([0.5, 0.2, 1.5], "the confidence of box 3 is 1.5; it must be within [0, 1]"),
        ([0.5, 0.2], "conf has the shape [2]; it must be [3]"),
    ],
)
def test_confidences_of_feature_files_are_checked(
    suffix: str, sure: list[float], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boxes = np.array([[0, 0.25, 0.5, 1]] * 3, np.float32)
    arrays = {"features": np.ones((3, 4), np.float32), "boxes": boxes, "conf": np.array(sure, np.float32)}
    file = tmp_path / f"a{suffix}"
    np.savez(file, **arrays) if suffix == ".npz" else save_file(arrays, file)
    assert main([str(file)]) == (2 if message else 0)
    assert capsys.readouterr().err == (f"villa_validate: error: '{file}': {message}\n" if message else "")


@pytest.mark.parametrize(
    ("file", "place", "message"),
    [
        ("images/feat_th0.2_max100_min10/data.mdb", "images", "has another checksum than feat_th0.2"),
        ("text.db/data.mdb", "text.db", "has another checksum than db.checksums"),
        ("files/a.npz", "files", "cannot read features from 'files/a.npz'"),
        ("a.tsv", "a.tsv", "a.tsv:1: not a line of region features"),
        ("grid/features.npy", "grid", "1 of 1 parts differ from their checksums"),
    ],
)
def test_one_altered_byte_is_found(
    made: Path, file: str, place: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray(Path(file).read_bytes())
    data[-30 if file.endswith(("npy", "tsv")) else len(data) // 2] ^= 0x80
    Path(file).write_bytes(data)
    assert main([place]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_a_word_piece_beyond_the_vocabulary_is_found(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TextDatabaseWriter(made / "other.db", {"CLS": 1, "SEP": 2, "MASK": 3, "v_range": [4, 9]}) as texts:
        texts.add("1", {"input_ids": [5, 600]}, 2, "a.npz")
    assert main(["other.db"]) == 2
    assert "example '1' is damaged (input_ids has the word-piece 600" in capsys.readouterr().err
