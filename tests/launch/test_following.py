"""What is shown of a job's processes: real processes of submitit that print and fail in their own ways."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import pytest
from submitit import LocalExecutor

from villa.launch.folder import job_folders
from villa.launch.following import Log, see_off

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the processes cannot import it


def rank() -> int:
    return int(os.environ["SUBMITIT_LOCAL_GLOBALID"])


def all_well() -> int:
    print("one\ntwo")
    return 0


def second_reports() -> int:
    if rank() == 1:
        time.sleep(0.3)
        print("what came before\nvilla_run: error: the picture is damaged\nmend it", flush=True)
    raise RuntimeError("without a word")


def second_is_killed() -> int:
    print(f"this is {rank()}", flush=True)
    if rank() == 1:
        os._exit(9)
    return 0


def see(function: Callable[[], int], folder: Path) -> int:
    executor = LocalExecutor(job_folders(folder))
    executor.update_parameters(tasks_per_node=2, timeout_min=5, stderr_to_stdout=True)
    return see_off(executor.submit(function), folder, "started", follow=True, local=True)


@pytest.mark.parametrize(
    ("function", "code", "shown"),
    [
        (all_well, 0, ["one", "two"]),
        (second_reports, 1, ["  rank 1: villa_run: error: the picture is damaged", "  rank 1: mend it"]),
        (second_is_killed, 1, ["this is 0", "  rank 1: this is 1"]),
    ],
)
def test_what_the_first_process_prints_and_the_last_words_of_the_one_that_failed(
    function: Callable[[], int],
    code: int,
    shown: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("villa.launch.following._GRACE", 0.0)
    assert see(function, tmp_path) == code
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith(f"started {others[-1].split()[1] if code else first.split()[1].rstrip(';')}; its log: ")
    if code:
        assert others.pop().endswith(f"failed; its logs: {Path(first.split()[-1]).parent}")
    assert others == shown


def test_a_log_is_read_as_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = Log(path)
    assert log.new_lines() == []
    path.write_text("submitit INFO (now) - starting\nfirst\nsec")
    assert log.new_lines() == ["first"]
    with path.open("a") as file:
        file.write("ond\nsubmitit ERROR (now) - triggered an exception\nTraceback:\n  a line\n")
    assert log.new_lines() == ["second"]
    with path.open("a") as file:
        file.write("JobFailed\nsubmitit INFO (now) - starting again\n\nthird")
    assert log.new_lines(last=True) == ["", "third"]
    assert log.new_lines(last=True) == []
