"""Launchers without a cluster: what they ask for, what they refuse, and processes of this machine."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import shapes_runs

from villa.cli.run import main
from villa.config import load
from villa.errors import ConfigError
from villa.launch.base import Request
from villa.launch.folder import job_folders
from villa.launch.local import _python
from villa.launch.slurm import SlurmConfig, python_of_jobs

RECIPE = [*shapes_runs.RECIPE, "training.updates=12"]


def test_the_processes_of_a_run_are_launched_no_further() -> None:
    request = Request(("config=a.yaml", "launcher=slurm", "launcher.nodes=2", "seed=1"), [])
    assert request.inner == ("config=a.yaml", "seed=1", "launcher=inline", "checkpoint.resume=true")


def test_a_run_that_does_not_train_is_not_asked_to_resume() -> None:
    for run_type in ("test", "predict", "robustness", "probe", "attention"):
        arguments = (*RECIPE, f"run_type={run_type}", "checkpoint.path=somewhere", "predict.input=a.jsonl")
        request = Request(arguments, [load(arguments).config])
        assert load(request.inner).config.run_type == run_type


def test_options_have_the_names_of_sbatch() -> None:
    config = SlurmConfig(nodes=4, gpus_per_node=8, cpus_per_process=6, memory_gb=1.5, partition="gpu", timeout_min=90)
    assert config.processes == 32
    assert config.parameters() == {
        "nodes": 4,
        "ntasks_per_node": 8,
        "gpus_per_node": 8,
        "cpus_per_task": 6,
        "mem": "1536M",
        "partition": "gpu",
        "time": 90,
    }
    assert SlurmConfig(nodes=3).parameters() == {"nodes": 3, "ntasks_per_node": 1, "time": 60}
    assert SlurmConfig(nodes=2, gpus_per_node=8, processes_per_node=4).processes == 8


@pytest.mark.parametrize(
    "option", ["nodes=0", "gpus_per_node=0", "processes_per_node=-1", "timeout_min=0", "memory_gb=0", "restarts=-1"]
)
def test_numbers_that_make_no_sense_are_refused(option: str) -> None:
    name, _, value = option.partition("=")
    with pytest.raises(ConfigError, match=rf"launcher\.{name}="):
        SlurmConfig(**{name: int(value)}).check()


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        (["launcher=slrum"], "did you mean 'slurm'?"),
        (["launcher=local", "launcher.processes=0"], "launcher.processes=0 is too small"),
        (["launcher=local", "launcher.processes=2"], "set distributed.strategy=ddp or fsdp"),
        (["launcher=local", "launcher.nodes=2"], "launcher.nodes (command line): unknown key"),
        (["launcher=local", "model.hidden=3"], "model.hidden"),
    ],
)
def test_mistakes_are_one_line_before_anything_starts(
    extra: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main([*RECIPE, f"output_dir={folder}", *extra]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line
    assert not folder.exists()


def test_processes_of_this_machine_reach_what_one_reaches(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also: the folder holds the recipe, the logs of all ranks, and a command that goes on by hand."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*RECIPE, f"output_dir={one}"]) == 0
    local = ["launcher=local", "launcher.processes=2", "distributed.strategy=ddp"]
    assert main([*RECIPE, f"output_dir={two}", *local]) == 0
    assert "on 2 processes (ddp)" in capfd.readouterr().out
    scores = [json.loads((folder / "metrics.json").read_text())["test"] for folder in (one, two)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    jobs = two / "jobs"
    assert len(list(jobs.glob("*/*_log.out"))) == 2
    assert "strategy: ddp" in (jobs / "config.yaml").read_text()
    again = (jobs / "resume.sh").read_text().replace("villa_run", f"{sys.executable} -m villa.cli.run")
    (tmp_path / "resume.sh").write_text(again)
    done = subprocess.run(["sh", str(tmp_path / "resume.sh")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resuming after update 12" in done.stdout


def test_a_failing_run_fails_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    assert main([*RECIPE, f"output_dir={folder}", "launcher=local", "optimizer.lr=1e30"]) == 1
    out = capfd.readouterr().out
    assert "\nvilla_run: error: update" in out
    assert f"failed; its logs: {folder}/jobs/" in out
    assert "Traceback" not in out
    assert "submitit" not in out


def test_ctrl_c_in_a_terminal_ends_a_followed_run_in_order(tmp_path: Path) -> None:
    """It reaches all processes at once, and submitit's, left alone, would kill the run's."""
    folder = tmp_path / "out"
    long = ["training.updates=100000", "checkpoint.every=1", "evaluation.every=null"]
    local = ["launcher=local", "launcher.processes=2", "distributed.strategy=ddp"]
    command = [sys.executable, "-m", "villa.cli.run", *RECIPE, f"output_dir={folder}", *long, *local]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 600
    while not list(folder.glob("checkpoints/update_*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGINT
    assert "ended by SIG" in printed
    assert "KeyboardInterrupt" not in printed
    with pytest.raises(ProcessLookupError):  # none of its processes is left
        os.killpg(process.pid, 0)


@pytest.mark.parametrize("visible", [None, "", "1,0"])
def test_processes_of_this_machine_see_the_gpus_that_the_command_sees(
    visible: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "CUDA_VISIBLE_DEVICES"
    monkeypatch.delenv(name, raising=False)
    if visible is not None:
        monkeypatch.setenv(name, visible)
    command = [*shlex.split(_python()), "-c", f"import os; print(repr(os.environ.get({name!r})))"]
    done = subprocess.run(command, env={**os.environ, name: "changed"}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr(visible)


def test_nobody_can_put_a_pickle_where_a_job_will_look(tmp_path: Path) -> None:
    first, second = job_folders(tmp_path), job_folders(tmp_path)
    assert first != second
    assert first.parent.parent == second.parent.parent == tmp_path


@pytest.mark.parametrize(("name", "number"), [("SIGUSR2", 12), ("SIGTERM", 15), ("SIGHUP", 1)])
def test_a_signal_before_the_run_can_hear_it_waits(name: str, number: int) -> None:
    """Python's own start, and the imports of what reads the job, take time: there the signal would kill the job."""
    code = f"import os, signal; os.kill(os.getpid(), signal.{name}); print(signal.sigpending())"
    done = subprocess.run(f"{python_of_jobs()} -c '{code}'", shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{{<Signals.{name}: {number}>}}\n"), done.stderr
