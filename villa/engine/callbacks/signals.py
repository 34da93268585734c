"""Ending in order on SIGTERM and SIGINT."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING, Any

from villa.engine.callbacks.base import Callback
from villa.trainers.base import Logs

if TYPE_CHECKING:
    from villa.engine.training import Training

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):  # noqa: N818 (not an error: the run ended in order)
    """The run was told to end and has saved its state. ``exit_code`` is 128 + the signal's number."""

    def __init__(self, number: int, update: int) -> None:
        super().__init__(f"{signal.Signals(number).name} after update {update}; go on with checkpoint.resume=true")
        self.exit_code = 128 + number


class SignalCallback(Callback):
    """Asks for a checkpoint after the current update when a signal came, then ends the run.

    A second SIGINT ends the process at once. It stands before the checkpoint callback, which does the saving.
    """

    name = "signals"

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_start(self, training: Training) -> None:
        """Install the handlers."""
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def on_update_end(self, training: Training, logs: Logs) -> None:
        """End the run when a signal has come."""
        if self.received is not None:
            raise Interrupted(self.received, training.progress.update)

    def on_end(self, training: Training) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self.received = number
