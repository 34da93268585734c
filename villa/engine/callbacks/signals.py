"""Ending a run in order on SIGTERM, SIGINT, and what SLURM jobs get before they are pre-empted, SIGUSR2."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from villa.engine.callbacks.base import Callback
from villa.signals import deferred
from villa.trainers.base import Logs

if TYPE_CHECKING:
    from villa.engine.training import Training


class SignalCallback(Callback):
    """Notes signals from the first update on, and ends the run where ``training.check`` finds one.

    It stands after the checkpoint callback, which saves when ``training.interrupt`` is set.

    Args:
        saving: the checkpoint callback; None saves nothing between two updates.
    """

    name = "signals"

    def __init__(self, saving: Callback | None = None) -> None:
        self.saving = saving
        self._noting = ExitStack()
        self._begun = 0

    def on_start(self, training: Training) -> None:
        """From now on signals wait."""
        self._begun = training.progress.update
        self._noting.enter_context(deferred())

    def on_update_end(self, training: Training, logs: Logs) -> None:
        """End a run whose evaluation a signal has cut short."""
        if training.interrupt is not None:
            training.check()

    def on_interrupt(self, training: Training) -> None:
        """Have the state saved, unless it is that which the run started with."""
        if self.saving is not None and training.progress.update > self._begun:
            self.saving.on_update_end(training, {})

    def on_end(self, training: Training) -> None:
        """From now on signals end the process wherever it is."""
        self._noting.close()
