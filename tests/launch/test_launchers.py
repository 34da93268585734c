"""Launchers without a cluster: what they ask for, what they refuse, and processes of this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from villa.cli.run import main
from villa.errors import ConfigError
from villa.launch.base import Request
from villa.launch.slurm import SlurmConfig

ROOT = Path(__file__).parents[2]
RECIPE = [
    f"config={ROOT}/projects/example/shapes.yaml",
    f"user_dir={ROOT}/projects/example/shapes",
    "training.epochs=null",
    "training.updates=12",
    "batch.per_pass=8",
    "logging.tensorboard=false",
]


def test_the_processes_of_a_run_are_launched_no_further() -> None:
    request = Request(("config=a.yaml", "launcher=slurm", "launcher.nodes=2", "seed=1"), [])
    assert request.inner == ("config=a.yaml", "seed=1", "launcher=inline", "checkpoint.resume=true")


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
    assert main([*RECIPE, f"output_dir={one}", "logging.progress=off"]) == 0
    local = ["launcher=local", "launcher.processes=2", "distributed.strategy=ddp"]
    assert main([*RECIPE, f"output_dir={two}", "logging.progress=off", *local]) == 0
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
    assert f"failed; its logs: {folder}/jobs/" in out
    assert "villa_run: error: update" in "".join(path.read_text() for path in folder.glob("jobs/*/*_log.*"))
