"""Ending in order on SIGTERM, SIGINT, and what SLURM jobs get before they are pre-empted, SIGUSR2."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING, Any

from villa.engine.callbacks.base import Callback
from villa.trainers.base import Logs

if TYPE_CHECKING:
    from villa.engine.training import Training

#: What SLURM sends before it takes the nodes away, and when the time is up.
PREEMPTED = signal.SIGUSR2
SIGNALS = (signal.SIGTERM, signal.SIGINT, PREEMPTED)


class Interrupted(Exception):  # noqa: N818 (not an error: the run ended in order)
    """The run was told to end and has saved its state. ``exit_code`` is 128 + the signal's number."""

    def __init__(self, number: int, update: int) -> None:
        super().__init__(f"{signal.Signals(number).name} after update {update}; go on with checkpoint.resume=true")
        self.exit_code = 128 + number


class SignalCallback(Callback):
    """Ends the run after the update in which a signal came; a second SIGINT ends the process at once.

    It stands after the checkpoint callback, which saves when ``training.interrupt`` is set.
    """

    name = "signals"

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}

    def on_start(self, training: Training) -> None:
        """Install the handlers."""

        def handle(number: int, frame: FrameType | None) -> None:
            if training.received is not None and number == signal.SIGINT:
                signal.default_int_handler(number, frame)
            training.receive(number)

        self._previous = {number: signal.signal(number, handle) for number in SIGNALS}

    def on_update_end(self, training: Training, logs: Logs) -> None:
        """End the run when a signal has come."""
        if training.interrupt is not None:
            raise Interrupted(training.interrupt, training.progress.update)

    def on_end(self, training: Training) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
