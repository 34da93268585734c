"""Data workers under watch: one that dies, hangs or is slow is reported with the example that it was reading."""

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

from villa.errors import DataError, StorageError
from villa.files import no_space
from villa.share import WHOLE, Share
from villa.signals import held_back

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds until a warning, where a recipe does not say.
TIMEOUT = 60.0
#: What takes so many times as long as a warning waits for counts as hanging.
HANGS = 10
#: Longest wait between two looks at the workers, in seconds.
_LOOK = 5.0
#: Seconds until a worker whose connection broke has surely ended.
_END = 1.0
#: Files that a process keeps open for each of its workers.
_DESCRIPTORS = 4
#: Open files that are enough for a process and for each of its workers.
_AMPLE = 256
#: What torch and Python say, besides the error's number, where there is no room for another open file.
_NO_DESCRIPTOR = ("Too many open files", "ancdata")
#: What the board says of a worker: the example (-1: none), how many more share the batch that is put together (-1: the
#: example itself is read), since when (seconds of the monotonic clock), its process id.
_INDEX, _MORE, _SINCE, _PROCESS = range(4)
_COLUMNS = 4


class Board:
    """What every worker is doing, in memory that they share with the process that waits for them.

    Args:
        workers: their number; with 0 the process that wants the data reads them itself.
        name: names an example for messages, by its index.
        timeout: seconds that an example, or putting a batch together, may take without a warning.
        share: which of the processes of the run this one is.
    """

    def __init__(self, workers: int, name: Callable[[int], str], timeout: float, share: Share = WHOLE) -> None:
        self.timeout, self.workers = timeout, workers
        self._name, self._share = name, share
        self._cells = multiprocessing.RawArray("d", [-1.0] * (_COLUMNS * max(workers, 1)))
        self._warned: set[tuple[float, ...]] = set()

    def begin(self, index: int, more: int = -1) -> None:
        """Note, where examples are read, what is done from now on.

        Args:
            index: the example that is read, or the first one of a batch that is put together.
            more: how many others are in this batch; -1 while examples are read.
        """
        first = self._ended()
        cells = self._cells
        cells[first + _SINCE], cells[first + _PROCESS], cells[first + _MORE] = time.monotonic(), os.getpid(), more
        cells[first + _INDEX] = index

    def end(self) -> None:
        """Note, where examples are read, that a batch is ready."""
        self._ended()

    def out_of_memory(self) -> DataError:
        """Return the error that what is being done, where examples are read, needs more memory than there is."""
        first = self._first()
        doing = self._doing(int(self._cells[first + _INDEX]), int(self._cells[first + _MORE]))
        return DataError(f"out of memory while {doing}; lower training.workers or the size of a batch")

    def late(self, workers: Sequence[BaseProcess] = ()) -> DataError | None:
        """Warn, once, of everything that takes longer than the timeout.

        Args:
            workers: the processes that read.

        Returns:
            The error that one of them hangs, if one does.
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
        """Return the error that workers have died.

        Args:
            workers: those that have.
        """
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
        """Note that nothing is being done any more; return where the cells of this worker begin."""
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
        print(f"rank {self._share.rank}: {message}", file=sys.__stderr__, flush=True)  # past what silences other ranks


def watched(loader: DataLoader[T], board: Board) -> Iterator[T]:
    """Yield what a loader loads; its ``timeout`` must be ``look_every(board)``.

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
    """Return what is wrong when nothing was loaded; None if it is only late."""
    if not isinstance(error, RuntimeError):  # a connection that broke with its worker
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
    """End all workers at once: those that wait for what a dead one holds would not listen to the loader."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(_END)


def out_of_descriptors(count: int) -> DataError | None:
    """Return the error that this process may not open so many more files, if that is so."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        needed = len(os.listdir("/proc/self/fd")) + count  # noqa: PTH208 (hot: once a batch)
    except OSError:  # a system that does not tell
        return None
    return _too_few_descriptors() if limit != resource.RLIM_INFINITY and needed > limit else None


def _raise_limit(workers: int) -> None:
    """Let this process and its workers open as many files as batches under way need, if they may."""
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
    """Return how often workers are looked at while a batch is waited for, in seconds; 0 without any."""
    return min(board.timeout, _LOOK) if board.workers else 0


def _start(loader: DataLoader[T]) -> tuple[Iterator[T], list[BaseProcess]]:
    """Start the workers; return the iterator and them."""
    if loader.num_workers:
        _raise_limit(loader.num_workers)
    problem = out_of_descriptors(_DESCRIPTORS * loader.num_workers)
    if problem is not None:
        raise problem
    others = {child.pid for child in multiprocessing.active_children()}
    handler = signal.getsignal(signal.SIGCHLD)
    with held_back():  # a worker that gets one before it is shielded would die of it
        loading = iter(loader)
    if handler is not None and threading.current_thread() is threading.main_thread():
        # The loader's own handler would raise wherever the main thread is when a worker dies: in a model, say.
        signal.signal(signal.SIGCHLD, handler)
    return loading, [child for child in multiprocessing.active_children() if child.pid not in others]


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
