"""Sweeps as processes: their tables hold what the runs reached, and what is missing is done, once."""

import csv
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from villa.cli.run import main

ROOT = Path(__file__).parents[2]
RECIPE = [
    f"config={ROOT}/projects/example/shapes.yaml",
    f"user_dir={ROOT}/projects/example/shapes",
    "training.epochs=null",
    "training.updates=6",
    "checkpoint.every=1",
    "evaluation.every=3",
    "logging.tensorboard=false",
    "logging.figures=false",
]
SWEEP = ["--sweep", "trainer=standard,villa", "seed=1,2", "--at-once", "2"]


def sweep(folder: Path, *extra: str) -> int:
    return main([*RECIPE, f"output_dir={folder}", *(extra or SWEEP)])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, Any]:
    """What the runs of a sweep left that does not depend on the time."""
    names = ("log.jsonl", "metrics.json", "predictions_test.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for name in names for path in folder.rglob(name)}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("sweep") / "out"
    with redirect_stdout(io.StringIO()) as printed:
        assert sweep(folder) == 0
    (folder / "printed.txt").write_text(printed.getvalue())
    return folder


def test_the_tables_hold_what_the_runs_reached(done: Path) -> None:
    runs = rows(done / "runs.csv")
    assert [(run["trainer"], run["seed"]) for run in runs] == [
        (trainer, seed) for trainer in ("standard", "villa") for seed in "12"
    ]
    for run in runs:
        folder = done / f"trainer={run['trainer']},seed={run['seed']}"
        reached = json.loads((folder / "metrics.json").read_text())["test"]["accuracy"]
        assert float(run["accuracy"]) == pytest.approx(100 * reached, abs=1e-9)
        assert f"{folder.name}: done, accuracy {100 * reached:.4g} %\n" in (done / "printed.txt").read_text()
    for row in rows(done / "table.csv"):
        scores = [float(run["accuracy"]) for run in runs if run["trainer"] == row["trainer"]]
        assert float(row["mean"]) == pytest.approx(statistics.fmean(scores))
        assert float(row["deviation"]) == pytest.approx(statistics.stdev(scores))
        assert (row["ended"], row["runs"]) == ("2", "2")
    assert (done / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_again_starts_nothing(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if "=" in path.parent.name}
    assert sweep(done) == 0
    assert "sweep of 4 runs" in (printed := capsys.readouterr().out)
    assert "4 done" in printed
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_only_what_is_missing_is_done(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(done)
    for path in sorted((done / "trainer=villa,seed=2").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert sweep(done) == 0
    assert "3 done" in capsys.readouterr().out
    assert contents(done) == before


def test_a_sweep_that_is_told_to_end_goes_on(done: Path, tmp_path: Path) -> None:
    """After SIGTERM its runs have saved their state, and the next start ends with the same bytes."""
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "villa.cli.run", *RECIPE, f"output_dir={folder}", *SWEEP]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 600
    while not list(folder.rglob("update_*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM
    assert "ended by SIGTERM; the same command goes on" in printed
    assert len(contents(folder)) < len(contents(done))
    assert sweep(folder) == 0
    assert contents(folder) == contents(done)


def test_a_run_that_fails_is_named_and_the_others_are_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    assert sweep(folder, "--sweep", "optimizer.lr=1e30,0.01") == 1
    printed = capsys.readouterr().out
    assert f"lr=1e30: failed with exit code 2, see {folder}/logs/lr=1e30.log" in printed
    assert "update" in (folder / "logs" / "lr=1e30.log").read_text()
    failed, fine = rows(folder / "table.csv")
    assert (failed["ended"], failed["mean"]) == ("0", "")
    assert fine["ended"] == "1"


def test_a_run_may_have_several_processes(tmp_path: Path) -> None:
    """The sweep waits for them whatever the launcher would do by itself."""
    folder = tmp_path / "out"
    local = ["launcher=local", "launcher.processes=2", "launcher.follow=false"]
    assert sweep(folder, *local, "distributed.strategy=ddp", "batch.per_pass=8", "--sweep", "seed=1") == 0
    assert "on 2 processes (ddp)" in (folder / "logs" / "seed=1.log").read_text()
    assert rows(folder / "table.csv")[0]["ended"] == "1"
    assert len(list((folder / "seed=1" / "jobs").glob("*/*_log.out"))) == 2


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        (["--sweep", "seed=1,2", "launcher=local", "launcher.processes=2"], "set distributed.strategy=ddp or fsdp"),
        (["--sweep", "trainer=standard,vila"], "run trainer=vila"),
        (["--sweep", "seed"], "is not of the form option=value,value,..."),
        (["--sweep", "seed=1", "output_dir=x"], "the folder of the whole sweep; give it before --sweep"),
        (["--sweep", "seed=1", "--at-once", "0"], "--at-once 0 is too few"),
        (["--sweep", "run_type=val", "checkpoint.path=x"], "does not go with a sweep"),
        (["--sweep", "seed=1", "--print-config"], "--sweep trains"),
        (["output_dir=", "--sweep", "seed=1"], "give the folder of the sweep"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(
    extra: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path / "out", *extra) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line
    assert not (tmp_path / "out").exists()
