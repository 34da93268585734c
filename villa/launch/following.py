"""Follow submitted jobs, printing the log of their first process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from villa.launch.folder import link_logs
from villa.signals import handled

if TYPE_CHECKING:
    from submitit import Job


#: Prefixes of submitit's own lines and of its errors, which a traceback follows.
_OWN, _LOG_ERROR = "submitit ", "submitit ERROR"


class Log:
    """A process's log, read as it grows, without submitit's own lines.

    Args:
        path: the file, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self._muted = False

    def new_lines(self, *, last: bool = False) -> list[str]:
        """Return the lines added since the last call.

        Args:
            last: the log is complete: also return an unfinished line.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text if last else text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        lines = whole.decode(errors="replace").split("\n")
        return [line for line in (lines if lines[-1] else lines[:-1]) if self._is_of_run(line)]

    def _is_of_run(self, line: str) -> bool:
        if line.startswith(_OWN):
            self._muted = line.startswith(_LOG_ERROR)
            return False
        return not self._muted


#: Seconds between polls; between repetitions of a signal; and until the results of ended processes are on the disk.
_PAUSE, _REMINDER, _GRACE = 0.5, 5.0, 10.0
#: Lines to show of a failed process that reports no error, and the prefix of an error.
_LAST_LINES, _ERROR = 10, "villa_run: error: "


def see_off(job: Job[Any], jobs: Path, started: str, *, follow: bool, local: bool = False) -> int:
    """Announce a started job and, if asked to, print the log of its first process until it has ended.

    Args:
        job: the job.
        jobs: folder of the run's jobs.
        started: words of the announcement: ``submitted job``.
        follow: whether to wait.
        local: whether the job runs on this machine, where signals to this process end it cleanly; otherwise Ctrl-C only
            stops following.

    Returns:
        0, 1 if it failed, or 128 + the number of the signal that ended it.
    """
    log = link_logs(jobs, job)
    print(f"{started} {job.job_id}; its log: {log}", flush=True)
    if not follow:
        return 0
    if local:
        with _passing_on(int(job.job_id)) as received:
            _follow(job, Log(log), received)
        if received:
            return 128 + received[0]
    else:
        try:
            _follow(job, Log(log), [])
        except KeyboardInterrupt:
            print(f"\njob {job.job_id} goes on; its log: {log}", flush=True)
            return 0
    failed = first_to_fail(job)
    if failed is None:
        return 0
    if failed.task_id:
        for line in _reason(failed):
            print(f"  rank {failed.task_id}: {line}")
    print(f"job {job.job_id} failed; its logs: {log.parent}", flush=True)
    return 1


def _follow(job: Job[Any], log: Log, received: list[int]) -> None:
    reminded = time.monotonic()
    ended = False
    while not ended:
        ended = job.done()
        for line in log.new_lines(last=ended):
            print(line, flush=True)
        if received and time.monotonic() > reminded + _REMINDER:  # a process that was still starting ignored it
            reminded = time.monotonic()
            _terminate(int(job.job_id))
        time.sleep(0 if ended else _PAUSE)


@contextmanager
def _passing_on(process: int) -> Iterator[list[int]]:
    """Pass SIGTERM, SIGHUP and SIGINT on to a local job as SIGTERM; yield the list of received signals."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        _terminate(process)

    with handled((signal.SIGTERM, signal.SIGHUP, signal.SIGINT), handle):
        yield received


def _terminate(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGTERM)


def first_to_fail(job: Job[Any]) -> Job[Any] | None:
    """Return the process of an ended job whose log explains its failure, or None if all succeeded.

    That is the process that reports an error; else the first one that left a result; else the first one.
    """
    ranks = [job.task(number) for number in range(job.num_tasks)]
    end = time.monotonic() + _GRACE
    while not all(rank.paths.result_pickle.exists() for rank in ranks) and time.monotonic() < end:
        time.sleep(_PAUSE)
    failed = [rank for rank in ranks if not rank.paths.result_pickle.exists() or rank.exception() is not None]
    return min(failed, key=lambda rank: (not _reports(rank), _ended(rank)), default=None)


def _reports(rank: Job[Any]) -> bool:
    return any(line.startswith(_ERROR) for line in Log(rank.paths.stdout).new_lines(last=True))


def _reason(rank: Job[Any]) -> list[str]:
    """Return the end of a process's log: from its last error on, or the last few lines."""
    lines = Log(rank.paths.stdout).new_lines(last=True)
    errors = [number for number, line in enumerate(lines) if line.startswith(_ERROR)]
    return lines[errors[-1] :] if errors else lines[-_LAST_LINES:]


def _ended(rank: Job[Any]) -> float:
    path = rank.paths.result_pickle
    return path.stat().st_mtime if path.exists() else float("inf")
