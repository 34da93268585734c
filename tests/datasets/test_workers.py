"""Data workers that die, hang or are slow are reported with the example that they were reading."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch.utils.data import get_worker_info
from torch.utils.data._utils import signal_handling

from villa.batch import Batch
from villa.config import load
from villa.config.schema import BatchConfig
from villa.datasets.base import Example, Split
from villa.datasets.collation import collate
from villa.datasets.samplers import UpdateSampler
from villa.datasets.stream import UpdateStream, evaluation_batches
from villa.datasets.uniter.database_split import ConcatenatedSplit
from villa.errors import ConfigError, DataError
from villa.share import Share

COUNT, BAD = 24, 5


class Faulty(Split):
    """Examples whose text is their index; something happens when a certain one is read."""

    def __init__(self, fault: Callable[[], object]) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Example:
        if index == BAD:
            self.fault()
        return Example(str(index), torch.tensor([index + 1]))

    @property
    def lengths(self) -> Sequence[int]:
        return [1] * COUNT


def kill(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def run_out() -> None:
    raise MemoryError


def stream(split: Split, workers: int, timeout: float = 60.0) -> UpdateStream:
    sampler = UpdateSampler(split.lengths, BatchConfig(examples=6, per_pass=3), seed=3)
    return UpdateStream(split, collate, sampler, workers, timeout=timeout)


def read_epoch(updates: UpdateStream) -> list[str]:
    return [id for _ in range(COUNT // 6) for batch in next(updates) for id in batch.ids]


def message(read: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        read()
    text = str(caught.value)
    assert "\n" not in text
    return text


def assert_closed(updates: UpdateStream) -> None:
    """No worker is left, once the exception that keeps the stream alive is gone."""
    updates.close()
    gc.collect()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("fault", "workers", "ended"),
    [
        (kill, 1, "was killed by SIGKILL while reading example 5: "),
        (kill, 2, "was killed by SIGKILL while reading example 5: "),
        (lambda: kill(signal.SIGSEGV), 1, "was killed by SIGSEGV while reading example 5: "),
        (lambda: os._exit(3), 2, "ended with exit code 3 while reading example 5: "),
        (run_out, 0, "out of memory while reading example 5; lower training.workers"),
        (run_out, 2, "out of memory while reading example 5; lower training.workers"),
    ],
)
def test_a_dead_worker_is_reported_with_its_example(fault: Callable[[], object], workers: int, ended: str) -> None:
    updates = stream(Faulty(fault), workers, timeout=0.5)
    assert ended in message(lambda: read_epoch(updates))
    assert_closed(updates)


def test_in_evaluation_too_and_what_to_do_is_said() -> None:
    split = ConcatenatedSplit([Faulty(lambda: None), Faulty(kill)])
    told = message(lambda: list(evaluation_batches(split, collate, 4, workers=2, timeout=0.5, share=Share(1, 2))))
    assert " of rank 1 was killed by SIGKILL while reading example 5: look at this example and its files" in told
    assert told.endswith("where memory is short, which ends processes by SIGKILL, lower training.workers")


def test_a_handler_that_another_loader_has_left_does_not_raise_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    before = signal.getsignal(signal.SIGCHLD)
    signal_handling._set_SIGCHLD_handler()
    try:
        for fault, told in ((kill, "was killed by SIGKILL"), (lambda: time.sleep(3600), " hangs: ")):
            assert told in message(lambda fault=fault: read_epoch(stream(Faulty(fault), 2, timeout=0.2)))  # type: ignore[misc]
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_batch_that_kills_is_named_by_its_first_example() -> None:
    def put_together(examples: Sequence[Example]) -> Batch:
        if get_worker_info() is not None and examples[0].id == "4":
            kill()
        return collate(examples)

    split = Faulty(lambda: None)
    told = message(lambda: list(evaluation_batches(split, put_together, 4, workers=1, timeout=0.5)))
    assert "while putting together the batch of example 4 and 3 more" in told


def test_a_worker_that_hangs_is_ended_and_named() -> None:
    updates = stream(Faulty(lambda: time.sleep(3600)), 2, timeout=0.2)
    started = time.monotonic()
    told = message(lambda: read_epoch(updates))
    assert " hangs: it has been reading example 5 for " in told
    assert told.endswith("look at this example and its files, or raise training.data_timeout")
    assert time.monotonic() - started < 1800
    assert_closed(updates)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_slow_example_is_named_once_and_delivered(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    batches = evaluation_batches(Faulty(lambda: time.sleep(1.5)), collate, 3, workers, timeout=0.4)
    with caplog.at_level(logging.WARNING, "villa"):
        assert [id for batch in batches for id in batch.ids] == [str(number) for number in range(COUNT)]
    told = [line for line in caplog.messages if line.startswith("reading example 5 takes long: ")]
    assert len(told) == 1
    assert told[0].endswith(" s so far (training.data_timeout=0.4)")


def test_nothing_is_said_of_what_is_quick(caplog: pytest.LogCaptureFixture) -> None:
    read_epoch(stream(Faulty(lambda: None), 2))
    assert not caplog.messages


def test_a_worker_that_dies_while_the_model_is_busy_is_reported_when_data_are_needed() -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    updates = stream(Faulty(lambda: None), 1, timeout=0.5)
    next(updates)
    assert signal.getsignal(signal.SIGCHLD) is handler
    (worker,) = multiprocessing.active_children()
    time.sleep(0.5)  # until it has read ahead
    while Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0] == "R":  # not yet: a busy machine
        time.sleep(0.01)
    worker.kill()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:  # nothing is raised here
        pass
    assert f"data worker {worker.pid} was killed by SIGKILL while waiting for work" in message(
        lambda: [next(updates) for _ in range(6)]
    )


@pytest.mark.parametrize("value", ["0", "-1", ".nan", ".inf", "true"])
def test_a_timeout_must_be_a_positive_number(value: str, root: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.data_timeout"):
        load([f"config={root / 'projects' / 'villa' / 'easy_vqa.yaml'}", f"training.data_timeout={value}"])


def read_all(workers: int, limit: int, *, hard: bool) -> subprocess.CompletedProcess[str]:
    """Read an epoch in a process that may open so many files."""
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); import test_workers\n"
        f"highest = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit} if {hard} else highest))\n"
        "from villa.command import run_command\n"
        "def read():\n"
        f"    reading = test_workers.stream(test_workers.Faulty(lambda: None), {workers})\n"
        "    print(sum(len(b) for _, update in zip(range(4), reading) for b in update)); return 0\n"
        "sys.exit(run_command('read', read))\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_too_few_open_files_are_one_line_and_enough_are_enough() -> None:
    codes = []
    for workers, limit in ((24, 64), (2, 17), (2, 20), (2, 23), (2, 26), (2, 60)):
        done = read_all(workers, limit, hard=True)
        codes.append(done.returncode)
        line = f"data workers need more open files than the {limit} that this process may have"
        assert "Traceback" not in done.stderr
        assert (done.returncode == 2) == (line in done.stderr), done.stderr
    assert (codes[0], codes[1], codes[-1]) == (2, 2, 0)


def test_a_limit_that_may_be_raised_is_raised() -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2048:
        pytest.skip("this process may not raise its limit far enough")
    done = read_all(8, 40, hard=False)
    assert (done.returncode, done.stdout) == (0, f"{COUNT}\n"), done.stderr
