"""Logging of training values: means over an interval to the trackers, speed to the timing log and the bar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from villa.engine.callbacks.base import Callback
from villa.engine.callbacks.intervals import Means, Speed
from villa.engine.progress import TrainingProgress
from villa.engine.tracking import Trackers
from villa.engine.training import Training
from villa.trainers.base import Logs


class LoggingCallback(Callback):
    """Writes a ``train`` record (deterministic) and a ``timing`` record (not) every so many updates.

    A value is the mean over the interval's updates that have it. Where updates have labels (the objectives of a
    mixture), a record holds each label's values and number of ``updates``, and for all of them ``loss`` and
    ``gradient_norm`` alone.

    Args:
        trackers: where records go.
        progress: the progress display.
        every: updates between records.
    """

    name = "logging"

    def __init__(self, trackers: Trackers, progress: TrainingProgress, every: int) -> None:
        self.trackers, self.progress, self.every = trackers, progress, every
        self._means = Means()
        self._speed = Speed()

    def on_start(self, training: Training) -> None:
        """Start the progress display."""
        self.progress.start(training.progress.update)

    def on_update_end(self, training: Training, logs: Logs) -> None:
        """Add up the update's values; write them when it is due."""
        label = training.stream.label
        self._means.add(logs, label)
        self._speed.add(training.seconds, training.stream.waited, training.examples, label)
        if training.progress.update % self.every == 0 or training.progress.finished:
            self.write(training)

    def write(self, training: Training) -> None:
        """Write the means since the last record, if there were updates."""
        if not self._means:
            return
        update = training.progress.update
        rate = training.updater.optimizer.param_groups[-1]["lr"]
        means = self._means.take()
        self.trackers.log(update, "train", {**means, "learning_rate": rate})
        timing = {"seconds": training.seconds + training.stream.waited, **self._speed.take()}
        self.trackers.log(update, "timing", timing)
        self.progress.advance(update, {**means, **timing}, best=training.progress.best)

    def on_end(self, training: Training) -> None:
        """Close the display and the trackers' buffers."""
        self.progress.stop()

    def state_dict(self) -> dict[str, Any]:
        """The means of the present interval so far, and where the log files stand."""
        return {"means": self._means.state_dict(), "trackers": self.trackers.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict()``; later records are taken back from the log."""
        self._means.load_state_dict(state["means"])
        self.trackers.load_state_dict(state["trackers"])


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
