"""``villa_run --new``: what it writes runs, and passes its own tests."""

import sys
from pathlib import Path

import pytest

from villa.cli.run import main
from villa.cli.skeletons import KINDS

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_skeleton_passes_its_test(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in KINDS:
        assert main(["--new", kind, f"own_{kind}"]) == 0
        assert f"test it: python -m pytest test_own_{kind}.py" in capsys.readouterr().out
    monkeypatch.setattr(sys, "path", [*sys.path])
    options = ["-q", "-x", "-p", "no:cacheprovider", "-c", "none.ini", "--rootdir", "."]
    Path("none.ini").write_text("[pytest]\n")
    assert pytest.main([*options, *(f"test_own_{kind}.py" for kind in KINDS)]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainr", "mine"], "--new trainr: give one of trainer, model, dataset, loss, attack, callback; did you mean"),
        (["trainer", "../mine"], "give a name of small letters, digits and _, such as my_trainer"),
        (["trainer", "class"], "give a name of small letters"),
        (["trainer", "freelb"], "there is a trainer of that name already"),
        (["loss", "torch"], "there is a Python module of that name already"),
        (["loss", "mine"], "'test_mine.py' exists; move it away or give another name"),
    ],
)
def test_refusals_write_nothing(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("test_mine.py").write_text("kept")
    assert main(["--new", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["test_mine.py"]
    assert Path("test_mine.py").read_text() == "kept"
