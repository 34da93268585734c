"""Storms of signals and kills at random moments: whatever hits a run, it ends with the bytes of one that nothing hit.

A few by default; ``VILLA_STORMS=50 VILLA_KILLS=200 pytest tests/launch/test_storms.py`` is for an evening.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from shapes_runs import SHAPES

STORMS, KILLS = int(os.environ.get("VILLA_STORMS", "2")), int(os.environ.get("VILLA_KILLS", "3"))
SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR2)
RECIPE = (
    f"config={SHAPES}.yaml",
    f"user_dir={SHAPES}",
    "trainer=villa",
    "batch.per_pass=8",
    "training.epochs=null",
    "training.updates=60",
    "training.workers=1",
    "evaluation.every=10",
    "evaluation.examples=25",
    "logging.every=2",
    "logging.tensorboard=false",
    "logging.figures=false",
    "logging.progress=off",
    "checkpoint.every=3",
    "checkpoint.resume=true",
)
COMMON = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "VILLA_START_TIMEOUT": "20"}
STRATEGIES = ("single", "ddp", "fsdp")
#: Ends of processes: done; another one was lost, or has not come; and of a signal, in order or before it is heard.
ALLOWED = {0, 1, 2, *(128 + number for number in SIGNALS), *(-number for number in (*SIGNALS, signal.SIGKILL))}
#: Seconds within which a run that was told to end has ended.
PATIENCE = 600

pytestmark = pytest.mark.slow


@dataclass
class Run:
    """A run of one process or two, started as often as it takes.

    Attributes:
        folder: its output folder.
        strategy: of ``distributed``.
        said: what its processes have printed.
    """

    folder: Path
    strategy: str
    said: str = ""
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self) -> None:
        count = 1 if self.strategy == "single" else 2
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "villa.cli.run", *RECIPE, f"output_dir={self.folder}"]
        self.processes = []
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            own = {name: str(value) for name, value in place.items()} if count > 1 else {}
            self.processes.append(
                subprocess.Popen(
                    [*command, f"distributed.strategy={self.strategy}"],
                    env={**os.environ, **COMMON, **own},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            )

    def send(self, number: int, everyone: bool, rank: int) -> None:
        """Send a signal to one process or all, as a terminal or SLURM do it: data workers get it, too."""
        for process in self.processes if everyone else [self.processes[rank]]:
            if process.poll() is None:
                (os.killpg if everyone else os.kill)(process.pid, number)

    def ended(self) -> list[int]:
        """Wait for all; return their exit codes. Nothing that they print is a traceback, but of Python's own start."""
        for process in self.processes:
            said = process.communicate(timeout=PATIENCE)[0]
            assert "Traceback" not in said or "run_command" not in said, said
            self.said += said
        return [process.returncode for process in self.processes]

    @property
    def left(self) -> dict[str, bytes]:
        """What must be the same to the byte."""
        weights = self.folder / "checkpoints/update_00000060/model.safetensors"
        scores = json.loads((self.folder / "metrics.json").read_text())
        del scores["protocol"]["provenance"]  # a commit in between is not what is tested here
        files = (weights, self.folder / "log.jsonl", self.folder / "predictions_test.jsonl")
        return {path.name: path.read_bytes() for path in files} | {"metrics.json": json.dumps(scores).encode()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, bytes], float]]:
    """What runs leave that nothing hits, and the seconds that they take."""
    found = {}
    for strategy in STRATEGIES:
        run, begun = Run(tmp_path_factory.mktemp(strategy) / "run", strategy), time.monotonic()
        run.start()
        assert set(run.ended()) == {0}, run.said
        found[strategy] = run.left, time.monotonic() - begun
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("what", "count"), [("storms", STORMS), ("kills", KILLS)])
def test_a_run_gets_there_to_the_same_bytes(
    what: str, count: int, strategy: str, whole: dict[str, tuple[dict[str, bytes], float]], tmp_path: Path
) -> None:
    draw, (left, seconds) = random.Random(f"{what} {strategy}"), whole[strategy]
    run, number, hit = Run(tmp_path / "run0", strategy), 0, 0
    share = -(-count // len(STRATEGIES))
    while hit < share:
        run.start()
        time.sleep(draw.uniform(0, seconds))
        hit += any(process.poll() is None for process in run.processes)
        rank = draw.randrange(len(run.processes))
        if what == "kills":
            run.send(signal.SIGKILL, draw.random() < 0.5, rank)
        else:
            for _ in range(draw.randrange(1, 9)):
                run.send(draw.choice(SIGNALS), draw.random() < 0.5, draw.randrange(len(run.processes)))
                time.sleep(draw.choice((0, 0.001, 0.01, 0.1)))
        codes = run.ended()
        assert {*codes} <= ALLOWED, run.said
        if set(codes) == {0}:
            assert run.left == left
            number += 1
            run = Run(tmp_path / f"run{number}", strategy)
    for _ in range(3):
        run.start()
        if set(run.ended()) == {0}:
            break
    assert run.left == left, run.said
