"""Signals that ask a process to end, from its first moment on. Nothing here imports torch.

Within ``interruptible`` a signal ends the process wherever it is, as Ctrl-C does, but in order and with 128 + its
number. Within ``deferred`` it is only noted: the loop looks for it where an update can be left without a trace.
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

#: What SLURM sends before it takes the nodes away, and when the time is up.
PREEMPTED = signal.SIGUSR2
#: From the weakest to the strongest: SLURM may send SIGTERM as well before it takes the nodes away. SIGHUP is what a
#: terminal sends that is closed.
SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, PREEMPTED)
#: Seconds after which a signal is sent again.
_SOON = 0.05


class Interrupted(KeyboardInterrupt):
    """A signal ends this process, in order.

    Args:
        number: of the signal.
        where: how far the run has come, and how it goes on.
        agreed: whether all processes of the run end here.
    """

    def __init__(self, number: int, where: str = "", *, agreed: bool = False) -> None:
        super().__init__(f"{signal.Signals(number).name}{where}")
        self.number, self.agreed = number, agreed

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, or of a stronger one that has come since."""
        return 128 + SIGNALS[max(_strength(self.number), urgency()) - 1]


class _Watch:
    """What this process has received, and whether it waits to be asked for it."""

    installed = False
    deferred = False
    strength = 0


def urgency() -> int:
    """Return the place, from 1, of the strongest signal in ``SIGNALS`` that this process has received; 0 for none."""
    return _Watch.strength


def check() -> None:
    """Raise ``Interrupted`` if a signal has come."""
    if _Watch.strength:
        raise Interrupted(SIGNALS[_Watch.strength - 1])


@contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let a function take in signals; afterwards they are handled as before.

    A process that ignores SIGHUP since its start (``nohup``) goes on to do so.
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
    """Let signals end this process in order; within another such block, or in another thread, it changes nothing.

    Raises:
        Interrupted: a signal has come.
    """
    if _Watch.installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    _Watch.installed, _Watch.deferred, _Watch.strength = True, False, 0
    try:
        with handled(SIGNALS, _handle), _none_lost():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # what started this process may have had them wait
            yield
    finally:
        _Watch.installed = False


@contextmanager
def _none_lost() -> Iterator[None]:
    """Send a signal again whose exception came up in a destructor or a callback, where Python only prints it."""
    before = sys.unraisablehook

    def hook(lost: Any) -> None:
        if not isinstance(lost.exc_value, Interrupted):
            before(lost)
        elif _Watch.installed:
            _Watch.strength = 0
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
    """Only note signals, for ``urgency``; a second SIGINT ends the process at once."""
    with interruptible():
        _Watch.deferred = True
        try:
            yield
        finally:
            _Watch.deferred = False


@contextmanager
def held_back() -> Iterator[None]:
    """Let signals wait, also for the threads and processes that are started within: these keep it so."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shield_worker(worker: int = 0) -> None:
    """Let signals to all of a run's processes pass a data worker by: its parent ends it when it has no more work.

    Args:
        worker: its number, which the loader gives.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != parent:
        pass
    os._exit(0)


def _handle(number: int, frame: FrameType | None) -> None:
    before, _Watch.strength = _Watch.strength, max(_Watch.strength, _strength(number))
    if before and number == signal.SIGINT:
        signal.default_int_handler(number, frame)
    if not _Watch.deferred and not before:
        check()


def _strength(number: int) -> int:
    return SIGNALS.index(signal.Signals(number)) + 1
