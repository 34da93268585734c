"""Data workers of one of two processes that are slow, or die: who is told what."""

import re
from pathlib import Path

import faults
import pair

OPTIONS = (
    "distributed.strategy=ddp",
    "training.updates=2",
    "training.workers=1",
    "training.data_timeout=0.5",
    "scheduler=constant",
)


def test_a_slow_worker_of_a_silent_process_is_told_of_and_a_dead_one_ends_all_with_one_line(tmp_path: Path) -> None:
    with pair.server() as context:
        assert pair.in_processes(context, faults.run, str(tmp_path / "run"), *OPTIONS) == [2, 2]
    slow = r"rank 1: reading example \d+ takes long: \d+\.\d s so far \(training\.data_timeout=0\.5\)\n"
    assert re.search(slow, (tmp_path / "run.1.err").read_text())
    printed = "".join(path.read_text() for path in sorted(tmp_path.glob("run.*.*")))
    (said,) = re.findall("error: .*", printed)
    dead = r"error: data worker \d+ of rank 1 was killed by SIGKILL while reading example \d+: look at this example"
    assert re.match(dead, said)
    assert "Traceback" not in printed
