"""Whole checkpoints of sharded ones: what they hold, who goes on from them, and that every mistake is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import metrics, run
from tool_runs import TOOLS, load_tool

from villa.checkpoints.layout import CHECKPOINTS
from villa.checkpoints.store import load

TRAINED = ("checkpoint.sharded=true", "evaluation.every=2", "checkpoint.keep=9")
TOOL = load_tool("consolidate_checkpoint")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run(folder, *TRAINED) == 0
    return folder


def test_a_run_goes_on_from_it_to_the_same_bytes(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = Path(CHECKPOINTS) / "update_00000002"
    assert TOOL.main([str(trained / name), str(tmp_path / "run" / name)]) == 0
    assert f"7 tensors of {trained / name}, and the optimiser's state of 7" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "run" / name).iterdir()} == {
        "model.safetensors",
        "training_state.pt",
        "config.yaml",
        "assets",
        "manifest.json",
    }
    whole, sharded = load(tmp_path / "run" / name), load(trained / name)
    assert [path.read_bytes() for path in sorted(whole.assets.iterdir())] == [
        path.read_bytes() for path in sorted(sharded.assets.iterdir())
    ]
    assert whole.config_yaml() == sharded.config_yaml()
    assert run(tmp_path / "run", *TRAINED, "checkpoint.resume=true") == 0
    assert "resuming after update 2" in capsys.readouterr().out
    last = Path(CHECKPOINTS) / "update_00000004"
    ours, theirs = (load(folder / last).model_state() for folder in (tmp_path / "run", trained))
    assert all(value.equal(theirs[name]) for name, value in ours.items())
    assert metrics(tmp_path / "run")["test"] == metrics(trained)["test"]


def test_a_run_goes_on_from_it_without_the_best_one(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best so far stays behind in the other folder: the best of those to come is tested."""
    name = Path(CHECKPOINTS) / "update_00000004"
    moved = load(trained / name)
    assert moved.training_state()["progress"]["best_update"] == 2
    assert TOOL.main([str(moved.path), str(tmp_path / "run" / name)]) == 0
    assert run(tmp_path / "run", *TRAINED, "checkpoint.resume=true", "training.updates=6", "optimizer.lr=1e-30") == 0
    assert metrics(tmp_path / "run")["protocol"]["update"] == 6


def test_its_best_checkpoint_is_taken_of_a_run_and_nothing_is_replaced_unasked(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "whole"
    assert TOOL.main([str(trained), str(output)]) == 0
    assert load(output).update == metrics(trained)["protocol"]["update"]
    assert TOOL.main([str(trained), str(output)]) == 2
    assert f"checkpoint '{output}' exists; give another folder, or --force" in capsys.readouterr().err
    assert TOOL.main([str(trained), str(output), "--force"]) == 0
    (output / "notes.txt").write_text("mine")
    assert TOOL.main([str(trained), str(output), "--force"]) == 2
    assert "is not overwritten: it holds 'notes.txt'" in capsys.readouterr().err
    assert (output / "notes.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_mistakes_are_one_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    checkpoint = str(trained / CHECKPOINTS / "update_00000004")
    wrong = {
        (str(tmp_path / "nowhere"), str(tmp_path / "a")): "does not exist",
        (checkpoint, checkpoint): "is the checkpoint itself",
        (checkpoint, str(tmp_path / "file")): "is a file",
        (checkpoint, str(tmp_path / "file" / "a")): "cannot be",
    }
    for arguments, message in wrong.items():
        assert TOOL.main([*arguments, "--force"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("consolidate_checkpoint: error: ")
        assert message in line


def test_it_runs_as_a_command() -> None:
    command = [sys.executable, str(TOOLS / "consolidate_checkpoint.py")]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "--force" in done.stdout
