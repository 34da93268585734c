"""Logging of training values: means over an interval to the trackers, speed to the timing log and the bar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from villa.engine.callbacks.base import Callback
from villa.engine.progress import TrainingProgress
from villa.engine.tracking import Trackers
from villa.engine.training import Training
from villa.trainers.base import Logs


class LoggingCallback(Callback):
    """Writes a ``train`` record (deterministic) and a ``timing`` record (not) every so many updates.

    Args:
        trackers: where records go.
        progress: the progress display.
        every: updates between records.
    """

    name = "logging"

    def __init__(self, trackers: Trackers, progress: TrainingProgress, every: int) -> None:
        self.trackers, self.progress, self.every = trackers, progress, every
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._since: tuple[float, float, int] = (0.0, 0.0, 0)

    def on_start(self, training: Training) -> None:
        """Start the progress display."""
        self.progress.start(training.progress.update)

    def on_update_end(self, training: Training, logs: Logs) -> None:
        """Add up the update's values; write them when it is due."""
        for name, value in logs.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value, dtype=torch.float64)) + value
        self._count += 1
        if training.progress.update % self.every == 0 or training.progress.finished:
            self.write(training)

    def write(self, training: Training) -> None:
        """Write the means since the last record, if there were updates."""
        if not self._count:
            return
        update = training.progress.update
        rate = training.updater.optimizer.param_groups[-1]["lr"]
        means = {name: value.item() / self._count for name, value in self._sums.items()}
        self.trackers.log(update, "train", {**means, "learning_rate": rate})
        self._sums, self._count = {}, 0
        timing = self._timing(training)
        self.trackers.log(update, "timing", timing)
        self.progress.advance(update, {**means, **timing}, best=training.progress.best)

    def on_end(self, training: Training) -> None:
        """Close the display and the trackers' buffers."""
        self.progress.stop()

    def state_dict(self) -> dict[str, Any]:
        """The sums of the present interval, and where the log files stand."""
        sums = {name: value.item() for name, value in self._sums.items()}
        return {"sums": sums, "count": self._count, "trackers": self.trackers.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict()``; later records are taken back from the log."""
        self._sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in state["sums"].items()}
        self._count = state["count"]
        self.trackers.load_state_dict(state["trackers"])

    def _timing(self, training: Training) -> dict[str, float]:
        busy, waited, examples = training.seconds, training.stream.waited, training.examples
        old_busy, old_waited, old_examples = self._since
        self._since = (busy, waited, examples)
        elapsed = max(busy - old_busy + waited - old_waited, 1e-9)
        return {
            "seconds": busy + waited,
            "examples_per_second": (examples - old_examples) / elapsed,
            "data_wait": (waited - old_waited) / elapsed,
        }


class LastIntervalCallback(Callback):
    """Writes the records of an interval that early stopping cuts short.

    It stands after the callback that stops the run and before the one that saves checkpoints, so that a stopped run
    that is resumed has them already.

    Args:
        logging: has the values.
    """

    name = "last_interval"

    def __init__(self, logging: LoggingCallback) -> None:
        self.logging = logging

    def on_update_end(self, training: Training, logs: Logs) -> None:
        """Write when the run is stopped."""
        if training.progress.stopped is not None:
            self.logging.write(training)
