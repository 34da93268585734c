"""Jobs of a real SLURM with two nodes: submitted, refused, pre-empted and requeued, and exact in the end."""

import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import gated
import pytest
from cluster import kill_node, ranks, start_node
from shapes_runs import Environment, said, villa_run, wait_for

UPDATES = 16
JOB = [
    f"user_dir={gated.__file__}",
    "trainer=gated",
    f"training.updates={UPDATES}",
    "evaluation.every=4",
    "evaluation.examples=10",
    "checkpoint.every=5",
    "distributed.strategy=ddp",
    "launcher=slurm",
    "launcher.nodes=2",
    "launcher.timeout_min=30",
]

pytestmark = pytest.mark.slow


def state(environment: Environment, job: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", said(environment, "scontrol", "show", "job", job)))


def results(folder: Path) -> dict[str, bytes]:
    """What a run leaves that does not depend on the time."""
    last = folder / "checkpoints" / f"update_{UPDATES:08}"
    names = ("log.jsonl", "metrics.json", "predictions_test.jsonl")
    found = {path.name: path.read_bytes() for path in (last / "model.safetensors", *(folder / name for name in names))}
    assert len(found) == 4
    return found


def submit(environment: Environment, folder: Path, *arguments: str) -> str:
    """Submit a job that stands at a gate, with checkpoints behind it, until ``let_go``."""
    behind_gate = {**environment, gated.GATE: f"{folder}.open"}
    done = villa_run(behind_gate, f"output_dir={folder}", *JOB, *arguments)
    assert done.returncode == 0, done.stderr
    match = re.search(r"^submitted job (\d+); its log: (\S+)$", done.stdout, re.MULTILINE)
    assert match is not None, done.stdout
    return match[1]


def let_go(folder: Path) -> None:
    Path(f"{folder}.open").touch()


@pytest.fixture(scope="module")
def uninterrupted(slurm: Environment, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder: Path = tmp_path_factory.mktemp("run") / "out"
    let_go(folder)
    done = villa_run({**slurm, gated.GATE: f"{folder}.open"}, f"output_dir={folder}", *JOB, "launcher.follow=true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 2 processes (ddp)" in done.stdout
    (job,) = folder.glob("jobs/[0-9]*")
    assert sorted(path.name for path in job.glob("*_log.out")) == [f"{job.name}_{rank}_log.out" for rank in (0, 1)]
    return results(folder)


@pytest.mark.parametrize("how", ["signal", "requeue"])
def test_a_job_that_is_taken_back_goes_on_to_the_same_bytes(
    how: str, slurm: Environment, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    """``signal`` is what SLURM sends before it pre-empts; ``requeue`` ends the processes without asking them."""
    folder = tmp_path / "out"
    job = submit(slurm, folder)
    wait_for(lambda: list(folder.glob("checkpoints/update_*")))
    said(slurm, *(("scancel", "--signal=USR2", job) if how == "signal" else ("scontrol", "requeue", job)))
    wait_for(lambda: state(slurm, job)["Restarts"] == "1")
    let_go(folder)
    wait_for(lambda: state(slurm, job)["JobState"] == "COMPLETED")
    log = (folder / "jobs" / job / f"{job}_0_log.out").read_text()
    assert "resuming after update" in log
    assert ("ended by SIGUSR2 after update" in log) == (how == "signal")
    assert results(folder) == uninterrupted


def first_log(folder: Path, job: str) -> str:
    """What rank 0 has printed so far, over all times that the job has run."""
    return "".join(path.read_text() for path in folder.glob(f"jobs/{job}*/{job}_0_log.out"))


def completed(environment: Environment, job: str) -> bool:
    now = state(environment, job)["JobState"]
    assert now not in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), now
    return now == "COMPLETED"


def wait_until_gone_on(environment: Environment, folder: Path, job: str) -> None:
    """Wait until a job has started again, and is done."""
    wait_for(lambda: int(state(environment, job)["Restarts"]) >= 1)
    let_go(folder)
    wait_for(lambda: completed(environment, job), 300)


def test_a_signal_while_a_job_starts_puts_it_back(
    slurm: Environment, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    job = submit(slurm, folder)
    wait_for(lambda: "Loading pickle" in first_log(folder, job))
    time.sleep(1)
    said(slurm, "scancel", "--signal=USR2", job)
    wait_until_gone_on(slurm, folder, job)
    assert results(folder) == uninterrupted


@pytest.fixture(scope="module", params=["SIGUSR2", "SIGTERM"])
def told_by(request: pytest.FixtureRequest, slurm: Environment) -> Iterator[str]:
    """Which signal SLURM pre-empts with: what a job has asked for, or, by default, SIGTERM only."""
    conf = Path(slurm["SLURM_CONF"])
    text = conf.read_text()
    if request.param == "SIGTERM":
        conf.write_text(text.replace("SlurmctldParameters=preempt_send_user_signal\n", ""))
        said(slurm, "scontrol", "reconfigure")
    yield request.param
    if conf.read_text() != text:
        conf.write_text(text)
        said(slurm, "scontrol", "reconfigure")


@pytest.mark.parametrize("begun", [False, True])
def test_a_job_of_a_higher_partition_takes_the_nodes(
    begun: bool, told_by: str, slurm: Environment, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    job = submit(slurm, folder)
    wait_for(lambda: list(folder.glob("checkpoints/update_*")) if begun else "Loading pickle" in first_log(folder, job))
    said(slurm, "sbatch", "-p", "high", "-N2", "-n2", "-c2", "-o", str(tmp_path / "high"), "--wrap=sleep 1")
    wait_until_gone_on(slurm, folder, job)
    assert f"ended by {told_by}" in first_log(folder, job)
    assert results(folder) == uninterrupted


def test_a_job_that_is_cancelled_does_not_come_back(slurm: Environment, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    job = submit(slurm, folder)
    wait_for(lambda: list(folder.glob("checkpoints/update_*")))
    said(slurm, "scancel", job)
    wait_for(lambda: "ended by SIGTERM" in first_log(folder, job))
    wait_for(lambda: state(slurm, job)["JobState"] == "CANCELLED")
    time.sleep(3)
    assert (state(slurm, job)["JobState"], state(slurm, job)["Restarts"]) == ("CANCELLED", "0")


def test_a_job_whose_time_is_up_goes_on(slurm: Environment, uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    job = submit(slurm, folder, "launcher.timeout_min=1", "launcher.signal_s=15")
    wait_until_gone_on(slurm, folder, job)
    assert "ended by SIGUSR2" in first_log(folder, job)
    assert results(folder) == uninterrupted


def test_a_job_whose_node_fails_goes_on_when_it_is_back(
    slurm: Environment, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    job = submit(slurm, folder)
    wait_for(lambda: list(folder.glob("checkpoints/update_*")))
    try:
        kill_node(slurm, "n2", ranks(job)[1])
        wait_for(lambda: int(state(slurm, job)["Restarts"]) >= 1)
    finally:
        start_node(slurm, "n2")
    let_go(folder)
    wait_for(lambda: completed(slurm, job))
    assert "node n2 does not answer: the job goes back into the queue" in first_log(folder, job)
    assert results(folder) == uninterrupted


@pytest.mark.parametrize("rank", [0, 1])
def test_a_job_that_loses_a_process_fails_with_its_name_and_the_next_one_goes_on(
    rank: int, slurm: Environment, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    job = submit(slurm, folder)
    wait_for(lambda: list(folder.glob("checkpoints/update_*")))
    os.kill(ranks(job)[rank], signal.SIGKILL)
    let_go(folder)
    wait_for(lambda: state(slurm, job)["JobState"] == "FAILED", 60)
    (other,) = folder.glob(f"jobs/{job}*/{job}_{1 - rank}_log.out")
    assert re.search(rf"error: process {rank} of 2 \(pid \d+ on n{rank + 1}\) was lost", other.read_text())
    again = submit(slurm, folder)
    wait_for(lambda: completed(slurm, again))
    assert results(folder) == uninterrupted


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (["launcher.partition=none"], "Invalid partition name specified"),
        (["launcher.nodes=3"], "Requested node configuration is not available"),
        (["launcher.cpus_per_process=64"], "Requested node configuration is not available"),
        (["launcher.gpus_per_node=8"], "Invalid generic resource"),
        (["launcher.memory_gb=9000"], "Requested node configuration is not available"),
    ],
)
def test_what_slurm_would_refuse_is_not_submitted(
    extra: Sequence[str], reason: str, slurm: Environment, tmp_path: Path
) -> None:
    done = villa_run(slurm, f"output_dir={tmp_path / 'out'}", *JOB, *extra)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert f"SLURM refuses the job ({reason}" in line
    assert not (tmp_path / "out").exists()
