"""A sweep as a job array of a real SLURM with two nodes."""

import csv
import re
from pathlib import Path

import gated
import pytest
from shapes_runs import Environment, said, villa_run, wait_for

JOB = [
    "training.updates=4",
    "distributed.strategy=ddp",
    "launcher=slurm",
    "launcher.timeout_min=30",
]
SWEEP = ["--sweep", "trainer=standard,villa", "seed=1,2", "--at-once", "2"]

pytestmark = pytest.mark.slow


def test_a_sweep_is_one_array_that_is_submitted_once_and_gone_on_with(slurm: Environment, tmp_path: Path) -> None:
    """One element is cancelled; what waits or runs is left alone; then only the cancelled one is submitted again."""
    folder = tmp_path / "out"
    said(slurm, "scontrol", "update", "partitionname=main", "state=down")  # jobs wait
    try:
        first = villa_run(slurm, *JOB, f"output_dir={folder}", *SWEEP)
        assert first.returncode == 0, first.stderr
        match = re.search(r"^submitted job array (\d+) of 4 runs, at most 2 at once$", first.stdout, re.MULTILINE)
        assert match is not None, first.stdout
        array = match[1]
        assert "ArrayTaskThrottle=2" in said(slurm, "scontrol", "show", "job", array)
        said(slurm, "scancel", f"{array}_1")
        again = villa_run(slurm, *JOB, f"output_dir={folder}", *SWEEP)
        assert "3 of the runs are in the queue already" in again.stdout, again.stderr
        assert re.search(r"^submitted job (\d+) of 1 run, at most 2 at once$", again.stdout, re.MULTILINE)
    finally:
        said(slurm, "scontrol", "update", "partitionname=main", "state=up")
    wait_for(lambda: len(list(folder.glob("*/finished.json"))) == 4, 240)
    collected = villa_run(slurm, *JOB, f"output_dir={folder}", *SWEEP)
    assert "sweep of 4 runs" in collected.stdout
    assert "submitted" not in collected.stdout
    with (folder / "table.csv").open() as file:
        assert [row["ended"] for row in csv.DictReader(file)] == ["2", "2"]
    jobs = folder / "trainer=villa,seed=1" / "jobs"
    assert {"config.yaml", "resume.sh", f"{array}_2"} <= {path.name for path in jobs.iterdir()}
    assert "on 1 process" in (jobs / f"{array}_2" / f"{array}_2_0_log.out").read_text()


def test_a_followed_sweep_of_several_processes_ends_with_its_table(slurm: Environment, tmp_path: Path) -> None:
    """The run that fails is named, with the folder of its logs."""
    folder = tmp_path / "out"
    done = villa_run(
        slurm,
        *JOB,
        f"output_dir={folder}",
        "launcher.nodes=2",
        "launcher.follow=true",
        "--sweep",
        "optimizer.lr=1e30,0.01",
        timeout=400,
    )
    assert done.returncode == 1, done.stderr
    assert re.search(r"^\d of 2 lr=0.01: done, accuracy ", done.stdout, re.MULTILINE), done.stdout
    assert f"of 2 lr=1e30: failed, see {folder}/lr=1e30/jobs\n" in done.stdout
    assert "| 0.01" in done.stdout
    (log,) = (folder / "lr=0.01" / "jobs").glob("*/*_0_log.out")
    assert "on 2 processes (ddp)" in log.read_text()
    assert len(list(log.parent.glob("*_log.out"))) == 2


def test_an_element_that_is_pre_empted_comes_back(slurm: Environment, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    long = [
        f"user_dir={gated.__file__}",
        "trainer=gated",
        "training.updates=300",
        "checkpoint.every=2",
        "evaluation.every=null",
        "--sweep",
        "seed=1,2",
    ]
    done = villa_run({**slurm, gated.GATE: f"{folder}.open"}, *JOB, f"output_dir={folder}", *long)
    (array,) = re.findall(r"^submitted job array (\d+) of 2 runs$", done.stdout, re.MULTILINE)
    wait_for(lambda: list((folder / "seed=2").glob("checkpoints/update_*")), 240)
    said(slurm, "scancel", "--signal=USR2", f"{array}_1")
    log = folder / "seed=2" / "jobs" / f"{array}_1" / f"{array}_1_0_log.out"
    wait_for(lambda: "resuming after update" in log.read_text(), 240)
    assert "ended by SIGUSR2 after update" in log.read_text()
    said(slurm, "scancel", array)


def test_a_refused_array_is_one_line_and_leaves_nothing(slurm: Environment, tmp_path: Path) -> None:
    done = villa_run(slurm, *JOB, f"output_dir={tmp_path / 'out'}", "launcher.nodes=3", *SWEEP)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("villa_run: error: SLURM refuses the job (Requested node configuration is not available")
    assert not (tmp_path / "out").exists()
