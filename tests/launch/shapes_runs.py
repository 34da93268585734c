"""Runs of the example recipe as its users start them, and what is asked of SLURM about them."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
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


def villa_run(environment: Environment, *arguments: str, timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "villa.cli.run", *RECIPE, *arguments]
    own = {**environment, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=own, timeout=timeout, check=False)


def said(environment: Environment, *command: str) -> str:
    """What a command that succeeds prints."""
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout


def wait_for(condition: Callable[[], object], seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.25)  # what is asked is a command of SLURM
