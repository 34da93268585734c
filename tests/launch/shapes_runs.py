"""Runs of the example recipe as its users start them, and what is asked of SLURM about them."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHAPES = f"{ROOT}/projects/example/shapes"
#: Counted in updates, and cut so that several processes can share it.
RECIPE = (
    f"config={SHAPES}.yaml",
    f"user_dir={SHAPES}",
    "training.epochs=null",
    "batch.per_pass=8",
    "logging.tensorboard=false",
    "logging.figures=false",
    "logging.progress=off",
)
Environment = Mapping[str, str]


def villa_run(environment: Environment, *arguments: str, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    """Run the command in a fork of this process, which has imported torch: that takes a new one most of its time."""
    command = ["villa_run", *RECIPE, *arguments]
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder, name) for name in ("stdout", "stderr")]
        process = multiprocessing.get_context("fork").Process(target=_run, args=(environment, command, printed))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, timeout, printed[0].read_bytes(), printed[1].read_bytes())
        return subprocess.CompletedProcess(command, process.exitcode, *(path.read_text() for path in printed))


def _run(environment: Environment, command: list[str], printed: Sequence[Path]) -> None:
    from villa.cli.run import main

    for stream, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not what pytest captures
    os.environ.clear()
    os.environ.update(environment, OMP_NUM_THREADS="1")
    sys.argv = command
    sys.exit(main())


def said(environment: Environment, *command: str) -> str:
    """What a command that succeeds prints."""
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout


def wait_for(condition: Callable[[], object], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.25)  # what is asked is a command of SLURM
