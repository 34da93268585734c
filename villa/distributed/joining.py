"""Running a command as one of a run's processes; a single process does not import torch for it."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from villa.distributed.environment import Place
from villa.signals import Interrupted, interruptible


@contextmanager
def joined() -> Iterator[None]:
    """Connect this process with the others of its run within the context.

    Only rank 0 prints. An error on one process ends all of them, and only one reports it.

    Raises:
        ConfigError: the environment variables are inconsistent.
        ConnectionLostError: another process ended without notice.
        SystemExit: another process has reported the error.
    """
    place = Place.read(os.environ)
    if place.world_size == 1:
        try:
            yield
        finally:
            if "villa.distributed.processes" in sys.modules:
                sys.modules["villa.distributed.processes"].disconnect()
        return
    from villa.distributed.processes import join

    with join(place):
        yield


def run_joined(action: Callable[[], int]) -> int:
    """Run an action within ``joined`` and return its exit code; signals end it cleanly.

    One of several processes exits without tearing the interpreter down: gloo's threads occasionally abort that
    (exit code 134), which a launcher would take for a failure.
    """
    place = Place.read(os.environ)
    try:
        with interruptible(), joined():
            code = action()
    except Interrupted as interrupted:
        if place.rank == 0:
            print(f"ended by {interrupted}", flush=True)
        code = interrupted.exit_code
    if code == 0 and place.world_size > 1:
        atexit.register(_leave)
    return code


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
