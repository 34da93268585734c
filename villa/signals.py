"""Signals that ask a process to end. Nothing here imports torch, so that they are handled from the start.

Within ``interruptible`` a signal ends the process wherever it is, as Ctrl-C does, but cleanly and with exit code 128 +
its number. Within ``deferred`` it is only recorded: the loop checks for it where an update can be abandoned safely.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: The signal that SLURM is told to send before it takes the nodes away and when the time is up.
PREEMPTED = signal.SIGUSR2
#: From the weakest to the strongest: SLURM may also send SIGTERM before it takes the nodes away. A closed terminal
#: sends SIGHUP.
SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, PREEMPTED)
#: Seconds after which a signal is sent again.
_SOON = 0.05
_MOST_RAISED = 2


class Interrupted(KeyboardInterrupt):
    """A signal ends this process cleanly.

    Args:
        number: number of the signal.
        where: how far the run has come and how to resume it, for the message.
        agreed: whether all processes of the run end here.
    """

    def __init__(self, number: int, where: str = "", *, agreed: bool = False) -> None:
        super().__init__(f"{signal.Signals(number).name}{where}")
        self.number, self.agreed = number, agreed

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, or of a stronger one received since."""
        return 128 + SIGNALS[max(_strength(self.number), urgency()) - 1]


class _Watch:
    """What this process has received, whether it defers handling it, and how many exceptions it has raised for it."""

    installed = False
    deferred = False
    strength = 0
    raised = 0


def urgency() -> int:
    """Return the position in ``SIGNALS``, from 1, of the strongest signal received; 0 for none."""
    return _Watch.strength


def check() -> None:
    """Raise ``Interrupted`` if a signal has been received."""
    if _Watch.strength:
        raise Interrupted(SIGNALS[_Watch.strength - 1])


@contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle signals with a function; afterwards they are handled as before.

    A process started to ignore SIGHUP (``nohup``) keeps ignoring it.
    """
    heard = [number for number in numbers if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let signals end this process cleanly. Does nothing within another such block or outside the main thread.

    Raises:
        Interrupted: a signal has been received.
    """
    if _Watch.installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    _Watch.installed, _Watch.deferred, _Watch.strength, _Watch.raised = True, False, 0, 0
    try:
        with handled(SIGNALS, _handle), _resend_lost():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the parent process may have blocked them
            yield
    finally:
        _Watch.installed = False


@contextmanager
def _resend_lost() -> Iterator[None]:
    """Resend a signal whose exception was raised in a destructor or callback, where Python only prints it."""
    before = sys.unraisablehook

    def hook(lost: Any) -> None:
        if not isinstance(lost.exc_value, Interrupted):
            before(lost)
        elif _Watch.installed:
            _Watch.strength = _Watch.raised = 0
            resend = threading.Timer(_SOON, os.kill, (os.getpid(), lost.exc_value.number))
            resend.daemon = True
            resend.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def deferred() -> Iterator[None]:
    """Only record signals, for ``urgency``; a second SIGINT ends the process at once."""
    with interruptible():
        _Watch.deferred = True
        try:
            yield
        finally:
            _Watch.deferred = False


@contextmanager
def held_back() -> Iterator[None]:
    """Block signals. Threads and processes started within inherit this and keep them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shield_worker(worker: int = 0) -> None:
    """Make a data worker ignore signals sent to all of a run's processes: its parent ends it when the work is done.

    Args:
        worker: the worker's number, passed by the loader.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_exit_on_request, args=(os.getppid(),), daemon=True).start()


def _exit_on_request(parent: int) -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != parent:
        pass
    os._exit(0)


def _handle(number: int, frame: FrameType | None) -> None:
    """Raise an exception for the first signal, and for SIGINT after it; no more, so that all of them can be caught."""
    before, _Watch.strength = _Watch.strength, max(_Watch.strength, _strength(number))
    if before and number == signal.SIGINT and _Watch.raised < _MOST_RAISED:
        _Watch.raised = _MOST_RAISED
        signal.default_int_handler(number, frame)
    if not _Watch.deferred and not before:
        _Watch.raised += 1
        check()


def _strength(number: int) -> int:
    return SIGNALS.index(signal.Signals(number)) + 1
