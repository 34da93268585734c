"""Supervision of data workers: one that dies, hangs or is slow is reported with the example that it was reading."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import TypeVar

from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import signal_handling

from villa.errors import DataError, StorageError
from villa.files import no_space
from villa.share import WHOLE, Share
from villa.signals import held_back

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Default seconds until a warning.
TIMEOUT = 60.0
#: Multiple of the timeout after which a worker counts as hanging.
HANGS = 10
#: Longest interval between checks of the workers, in seconds.
_LOOK = 5.0
#: Seconds after a broken connection until its worker has ended.
_END = 1.0
#: File descriptors that a process holds for each worker.
_DESCRIPTORS = 4
#: File descriptors that suffice for a process, and again for each worker.
_AMPLE = 256
#: Messages of torch and Python, besides the error number, when file descriptors run out.
_NO_DESCRIPTOR = ("Too many open files", "ancdata")
#: Columns of the board, per worker: example (-1: none), other examples of the batch being collated (-1: reading the
#: example itself), start (seconds of the monotonic clock), process id.
_INDEX, _MORE, _SINCE, _PROCESS = range(4)
_COLUMNS = 4


class Board:
    """The current activity of every worker, in memory shared with the process that waits for them.

    Args:
        workers: number of workers; 0 if the process reads its own data.
        name: returns an example's name for messages, by its index.
        timeout: seconds that reading an example or collating a batch may take without a warning.
        share: rank and world size of this process.
    """

    def __init__(self, workers: int, name: Callable[[int], str], timeout: float, share: Share = WHOLE) -> None:
        self.timeout, self.workers = timeout, workers
        self._name, self._share = name, share
        self._cells = multiprocessing.RawArray("d", [-1.0] * (_COLUMNS * max(workers, 1)))
        self._warned: set[tuple[float, ...]] = set()

    def begin(self, index: int, more: int = -1) -> None:
        """Record, in the reading process, what it starts to do.

        Args:
            index: the example being read, or the first of the batch being collated.
            more: number of other examples in this batch; -1 while reading.
        """
        first = self._ended()
        cells = self._cells
        cells[first + _SINCE], cells[first + _PROCESS], cells[first + _MORE] = time.monotonic(), os.getpid(), more
        cells[first + _INDEX] = index

    def end(self) -> None:
        """Record, in the reading process, that a batch is ready."""
        self._ended()

    def out_of_memory(self) -> DataError:
        """Return the error that the reading process's current activity ran out of memory."""
        first = self._first()
        doing = self._doing(int(self._cells[first + _INDEX]), int(self._cells[first + _MORE]))
        return DataError(f"out of memory while {doing}; lower training.workers or the size of a batch")

    def late(self, workers: Sequence[BaseProcess] = ()) -> DataError | None:
        """Warn, once each, about activities that exceed the timeout; return an error if a worker hangs.

        Args:
            workers: the worker processes.
        """
        for index, more, since, process in self._rows():
            seconds = time.monotonic() - since
            if index < 0 or seconds < self.timeout:
                continue
            doing = self._doing(index, more)
            if seconds >= HANGS * self.timeout and any(worker.pid == process for worker in workers):
                return DataError(
                    f"{self._worker(process)} hangs: it has been {doing} for {seconds:.0f} s; look at this example and "
                    "its files, or raise training.data_timeout"
                )
            if (index, more, since) not in self._warned:
                self._warned.add((index, more, since))
                self._warn(f"{doing} takes long: {seconds:.1f} s so far (training.data_timeout={self.timeout:g})")
        return None

    def died(self, workers: list[BaseProcess]) -> DataError:
        """Return the error that these workers have died."""
        rows = {process: (index, more) for index, more, _, process in self._rows()}
        told = []
        for worker in workers:
            index, more = rows.get(worker.pid or 0, (-1, -1))
            doing = self._doing(index, more) if index >= 0 else "waiting for work"
            told.append(f"{self._worker(worker.pid)} {_ending(worker.exitcode)} while {doing}")
        return DataError(
            f"{'; '.join(told)}: look at this example and its files; where memory is short, which ends processes by "
            "SIGKILL, lower training.workers"
        )

    def _ended(self) -> int:
        """Record that nothing is being done; return the first cell of this worker."""
        if get_worker_info() is None:
            self.late()
        first = self._first()
        self._cells[first + _INDEX] = -1
        return first

    def _first(self) -> int:
        worker = get_worker_info()
        return _COLUMNS * worker.id if worker else 0

    def _rows(self) -> Iterator[tuple[int, int, float, int]]:
        cells = self._cells[:]
        for at in range(0, len(cells), _COLUMNS):
            yield int(cells[at + _INDEX]), int(cells[at + _MORE]), cells[at + _SINCE], int(cells[at + _PROCESS])

    def _doing(self, index: int, more: int) -> str:
        if more < 0:
            return f"reading {self._name(index)}"
        others = f" and {more} more" if more else ""
        return f"putting together the batch of {self._name(index)}{others}"

    def _worker(self, process: int | None) -> str:
        rank = f" of rank {self._share.rank}" if self._share.world_size > 1 else ""
        return f"data worker {process}{rank}"

    def _warn(self, message: str) -> None:
        if not self._share.rank:
            logger.warning("%s", message)
            return
        print(f"rank {self._share.rank}: {message}", file=sys.__stderr__, flush=True)  # not silenced, unlike stdout


def watched(loader: DataLoader[T], board: Board) -> Iterator[T]:
    """Yield a loader's batches; its ``timeout`` must be ``look_every(board)``.

    Raises:
        DataError: a worker died or hangs.
    """
    loading, workers = _start(loader)
    while True:
        try:
            loaded = next(loading)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            problem = _judge(error, board, workers)
            if problem is None:
                continue
            _end(workers)
            raise problem from (None if problem is error else error)
        yield loaded


def _judge(error: Exception, board: Board, workers: list[BaseProcess]) -> Exception | None:
    """Return the error behind a failed load, or None if the batch is only late."""
    if not isinstance(error, RuntimeError):  # a connection that broke when its worker died
        time.sleep(_END)
    dead = [worker for worker in workers if not worker.is_alive()]
    if dead:
        return board.died(dead)
    if getattr(error, "errno", None) == errno.EMFILE or any(text in str(error) for text in _NO_DESCRIPTOR):
        return _too_few_descriptors()
    if no_space(error) is not None:
        return StorageError(f"{no_space(error)} for what data workers hand over (/dev/shm); lower training.workers")
    return board.late(workers) if "DataLoader timed out" in str(error) else error


def _end(workers: list[BaseProcess]) -> None:
    """Kill all workers at once: those waiting for a lock of a dead one would not react to the loader."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(_END)


def out_of_descriptors(count: int) -> DataError | None:
    """Return an error if this process may not open ``count`` more files."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        needed = len(os.listdir("/proc/self/fd")) + count  # noqa: PTH208 (hot: once a batch)
    except OSError:  # a system without /proc
        return None
    return _too_few_descriptors() if limit != resource.RLIM_INFINITY and needed > limit else None


def _raise_limit(workers: int) -> None:
    """Raise the limit on open files as far as allowed and needed for the batches in flight."""
    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _AMPLE * (1 + workers)
    if highest != resource.RLIM_INFINITY:
        wanted = min(wanted, highest)
    if limit != resource.RLIM_INFINITY and limit < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, highest))


def _too_few_descriptors() -> DataError:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return DataError(
        f"data workers need more open files than the {limit} that this process may have; raise the limit (ulimit -n "
        "4096), or lower training.workers"
    )


def look_every(board: Board) -> float:
    """Return the interval between checks of the workers in seconds; 0 without workers."""
    return min(board.timeout, _LOOK) if board.workers else 0


def _start(loader: DataLoader[T]) -> tuple[Iterator[T], list[BaseProcess]]:
    """Start the workers; return the iterator and the worker processes."""
    if loader.num_workers:
        _raise_limit(loader.num_workers)
    problem = out_of_descriptors(_DESCRIPTORS * loader.num_workers)
    if problem is not None:
        raise problem
    others = {child.pid for child in multiprocessing.active_children()}
    handler = signal.getsignal(signal.SIGCHLD)
    with held_back():  # a signal would kill a worker that is not shielded yet
        loading = iter(loader)
    # torch's handler would raise wherever the main thread is when a worker dies, such as in a model. Another loader may
    # have left it, so that no worker is given to it either.
    if getattr(loading, "_worker_pids_set", False):
        signal_handling._remove_worker_pids(id(loading))  # type: ignore[attr-defined]
        loading._worker_pids_set = False  # type: ignore[attr-defined]
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return loading, [child for child in multiprocessing.active_children() if child.pid not in others]


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
