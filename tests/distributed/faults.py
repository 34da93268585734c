"""A run of the example recipe in which things happen to the data workers of the process of rank 1."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pair
from torch.utils.data import get_worker_info

from villa.datasets.base import Example
from villa.datasets.stream import _MicroBatches

_read = _MicroBatches._read
#: Examples that this worker has read.
_count = [0]


def run(folder: str, *options: str) -> None:
    """Run the recipe. The third example of a worker takes long in evaluation, and kills it in training.

    What goes to the process's own standard error, whatever ``sys.stderr`` is, is written to ``<folder>.<rank>.err``.
    """

    def read(self: _MicroBatches, index: int, seed: int | None) -> Example:
        _count[0] += os.environ["RANK"] == "1" and get_worker_info() is not None
        if _count[0] == 3:
            self.board.begin(index)
            if seed is not None:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1.5)
        return _read(self, index, seed)

    multiprocessing.set_start_method("fork", force=True)  # as in processes that torchrun starts: workers read so, too
    _MicroBatches._read = read  # type: ignore[method-assign]
    with Path(f"{folder}.{os.environ['RANK']}.err").open("w") as error:
        os.dup2(error.fileno(), sys.__stderr__.fileno())
    pair.recipe(folder, *options)


def meet(folder: str, absent: int) -> None:
    """Run the recipe, but one of the processes is killed before it meets the others, who wait for seconds."""
    if os.environ["RANK"] == str(absent):
        os.kill(os.getpid(), signal.SIGKILL)
    os.environ["VILLA_START_TIMEOUT"] = "12"
    pair.recipe(folder)
