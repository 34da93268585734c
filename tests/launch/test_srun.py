"""``srun`` and ``mpirun`` without torchrun: their processes share a run, are runs of their own, or are refused."""

import os
import pty
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from shapes_runs import RECIPE, Environment

from villa.distributed.environment import Place, Started, first_node
from villa.errors import ConfigError

PYTHON = [sys.executable, "-m", "villa.cli.run"]
SHORT = [*RECIPE, "training.updates=2", "evaluation.examples=50"]
DDP = "distributed.strategy=ddp"
#: What srun says to the second of two tasks on two nodes.
STEP = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_TASK_PID": "0",
}


def ran(environment: Environment, *command: str, stdin: int | None = None) -> subprocess.CompletedProcess[str]:
    own = {**environment, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=own, stdin=stdin, timeout=300, check=False)


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("villa_run: error: ")]


def adopted(environment: Mapping[str, str]) -> dict[str, str]:
    started, given = Started.read(environment), dict(environment)
    assert started is not None
    started.adopt(given)
    return {name: given[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("n[08-11,15],m3", "n08"),
        ("gpu[3,7]-ib", "gpu3-ib"),
        ("r[1-2]n[07-09]", "r1n07"),
        ("a,b", "a"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_the_tasks_of_a_step_meet_on_its_first_node() -> None:
    given = adopted(STEP)
    assert given | {"MASTER_PORT": ""} == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "",
    }
    ports = {adopted({**STEP, "SLURM_STEP_ID": str(step)})["MASTER_PORT"] for step in range(20)}
    assert len(ports) == 20
    assert all(1024 < int(port) < 32768 for port in ports)
    assert adopted({**STEP, "SLURM_STEP_NUM_NODES": "1"})["MASTER_ADDR"] == "127.0.0.1"


def test_what_is_set_by_hand_counts() -> None:
    given = adopted({**STEP, "MASTER_ADDR": "other", "MASTER_PORT": "29500", "WORLD_SIZE": "2"})
    assert (given["MASTER_ADDR"], given["MASTER_PORT"], given["RANK"]) == ("other", "29500", "1")


@pytest.mark.parametrize(
    "extra",
    [
        {"RANK": "0", "WORLD_SIZE": "4"},  # torchrun within srun
        {"WORLD_SIZE": "1"},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_ID": ""},  # the script of a job, or the shell of salloc
        {"SLURM_PTY_PORT": "40000"},  # a shell in a terminal
    ],
)
def test_what_is_alone_or_of_torchrun_stays_so(extra: dict[str, str]) -> None:
    assert Started.read({**STEP, "SLURM_NTASKS": "4", **extra}) is None
    assert Place.read({**STEP, "SLURM_NTASKS": "4"}) == Place()


def test_what_mpirun_starts_says_where_it_meets_or_is_refused() -> None:
    ranks = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    with pytest.raises(ConfigError, match="mpirun has started 4 processes, but MASTER_ADDR and MASTER_PORT"):
        adopted(ranks)
    within = {**STEP, **ranks, "MASTER_ADDR": "a", "MASTER_PORT": "1"}  # whose daemons srun has started
    assert (adopted(within)["RANK"], adopted(within)["WORLD_SIZE"]) == ("3", "4")
    assert adopted({**STEP, "PMI_SIZE": "2", "PMI_RANK": "1"})["MASTER_ADDR"] == "n1"  # srun --mpi=pmi2
    assert Started.read({**ranks, "OMPI_COMM_WORLD_SIZE": "1"}) is None


def test_processes_with_the_variables_of_mpirun_share_a_run(tmp_path: Path) -> None:
    folder, port = tmp_path / "out", 31987
    command = [*PYTHON, *SHORT, DDP, f"output_dir={folder}"]
    processes = []
    for rank in ("0", "1"):
        ranks = {f"OMPI_COMM_WORLD_{name}": rank for name in ("RANK", "LOCAL_RANK")} | {"OMPI_COMM_WORLD_SIZE": "2"}
        place = {**os.environ, **ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, env=place, stdout=subprocess.PIPE, text=True))
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "on 2 processes (ddp)" in printed[0]
    assert printed[1] == ""


@pytest.mark.slow
def test_the_tasks_of_a_step_share_a_run_on_one_node_or_two(slurm: Environment, tmp_path: Path) -> None:
    logs = []
    for nodes in (1, 2):
        folder = tmp_path / str(nodes)
        done = ran(slurm, "srun", "-n2", f"-N{nodes}", *PYTHON, *SHORT, DDP, f"output_dir={folder}")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("on 2 processes (ddp)") == 1
        logs.append((folder / "log.jsonl").read_bytes())
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_tasks_that_would_write_one_folder_are_refused_in_one_line(slurm: Environment, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    done = ran(slurm, "srun", "-n2", *PYTHON, *SHORT, f"output_dir={folder}")
    assert done.returncode == 2
    (line,) = errors(done)
    assert "srun has started 2 processes, but distributed.strategy is 'single'" in line
    assert not folder.exists()
    (line,) = errors(ran(slurm, "srun", "-n2", *PYTHON, *SHORT, DDP, "--sweep", "seed=1,2"))
    assert "start it without torchrun or srun" in line
    (line,) = errors(ran(slurm, "srun", "-n2", *PYTHON, *SHORT, DDP, "nope=1"))
    assert "nope" in line


@pytest.mark.slow
def test_tasks_with_folders_of_their_own_are_runs_of_their_own(slurm: Environment, tmp_path: Path) -> None:
    command = f"{' '.join([*PYTHON, *SHORT])} output_dir={tmp_path}/$SLURM_PROCID; exit $?"
    done = ran(slurm, "srun", "-n2", "bash", "-c", command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("on 1 process\n") == 2
    assert len(list(tmp_path.glob("[01]/finished.json"))) == 2


@pytest.mark.slow
def test_one_command_in_a_script_or_a_shell_of_several_tasks_is_alone(slurm: Environment, tmp_path: Path) -> None:
    """Also a script that a task of a step has submitted: it has that step's variables."""
    script, out = tmp_path / "job.sh", tmp_path / "job.out"
    script.write_text(f"#!/bin/sh\nexec {' '.join([*PYTHON, *SHORT, DDP])} output_dir={tmp_path / 'job'}\n")
    submit = f"test $SLURM_PROCID = 1 || sbatch -W -n2 -o {out} {script}"
    assert ran(slurm, "srun", "-n2", "bash", "-c", submit).returncode == 0
    assert "on 1 process\n" in out.read_text()
    shell = ran(slurm, "salloc", "-n2", *PYTHON, *SHORT, DDP, f"output_dir={tmp_path / 'salloc'}")
    assert "on 1 process\n" in shell.stdout, shell.stderr


@pytest.mark.slow
def test_a_shell_in_a_terminal_does_not_wait_for_tasks_that_are_gone(slurm: Environment, tmp_path: Path) -> None:
    """``srun --pty bash``: the other task's shell ends at once, for it has no terminal."""
    main, terminal = pty.openpty()
    command = ["srun", "-n2", "-N1", "--pty", "bash", "--norc"]
    own = {**slurm, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=own, stdin=terminal, stdout=terminal, stderr=terminal) as shell:
        os.close(terminal)
        run = f"{' '.join([*PYTHON, *SHORT, DDP])} output_dir={tmp_path / 'out'} > {tmp_path / 'said'}\nexit\n"
        os.write(main, run.encode())
        try:
            while os.read(main, 4096):
                pass
        except OSError:  # the terminal is closed
            pass
        assert shell.wait(60) == 0
    os.close(main)
    assert "on 1 process\n" in (tmp_path / "said").read_text()


@pytest.mark.slow
def test_torchrun_within_srun_is_torchruns(slurm: Environment, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    folder = tmp_path / "$SLURM_PROCID"
    command = f"{' '.join([*torchrun, '-m', 'villa.cli.run', *SHORT, DDP])} output_dir={folder}; exit $?"
    done = ran(slurm, "srun", "-n2", "-N2", "bash", "-c", command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("on 2 processes (ddp)") == 2
