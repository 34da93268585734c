"""Logging of training: interval means to the trackers, speed to the timing log and the progress bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from villa.engine.loop import Callback, Training
from villa.progress import TrainingProgress
from villa.tracking import Trackers
from villa.trainers.base import Logs

#: Values shared by updates of all labels.
_SHARED = ("loss", "gradient_norm")


class Means:
    """Means over the updates of an interval, each over the updates that have the value."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._updates: dict[str, int] = {}

    def __bool__(self) -> bool:
        """Return whether there are values."""
        return bool(self._counts)

    def add(self, logs: Logs, label: str | None) -> None:
        """Add an update's values; with a label, all of them under it, and shared ones also without."""
        if label is None:
            values = dict(logs)
        else:
            self._updates[label] = self._updates.get(label, 0) + 1
            values = {name: logs[name] for name in _SHARED if name in logs}
            values |= {f"{label}/{name}": value for name, value in logs.items()}
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.double()
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """Return the means by name, with ``<label>/updates`` for every label, and reset them."""
        means = {name: value.item() / self._counts[name] for name, value in self._sums.items()}
        means |= {f"{label}/updates": float(count) for label, count in self._updates.items()}
        self._sums, self._counts, self._updates = {}, {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and counts."""
        sums = {name: value.item() for name, value in self._sums.items()}
        return {"sums": sums, "counts": dict(self._counts), "updates": dict(self._updates)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict()``."""
        self._sums = {name: torch.tensor(float(value), dtype=torch.float64) for name, value in state["sums"].items()}
        self._counts = {name: int(state["counts"][name]) for name in self._sums}
        self._updates = {label: int(count) for label, count in state["updates"].items()}
        if not all(count > 0 for count in (*self._counts.values(), *self._updates.values())):
            raise ValueError("means over no updates")


class Speed:
    """Examples per second over an interval, in total and by label. Not saved: a resumed run starts afresh."""

    def __init__(self) -> None:
        self._before = (0.0, 0.0, 0)
        self._seconds: dict[str, float] = {}
        self._examples: dict[str, int] = {}
        self._waited = 0.0

    def add(self, busy: float, waited: float, examples: int, label: str | None) -> None:
        """Record the totals after an update: seconds of work, seconds of waiting for data, examples."""
        old_busy, old_waited, old_examples = self._before
        self._before = (busy, waited, examples)
        self._waited += waited - old_waited
        for prefix in ("",) if label is None else ("", f"{label}/"):
            seconds = busy - old_busy + waited - old_waited
            self._seconds[prefix] = self._seconds.get(prefix, 0.0) + seconds
            self._examples[prefix] = self._examples.get(prefix, 0) + examples - old_examples

    def take(self) -> dict[str, float]:
        """Return ``examples_per_second`` (also by label) and ``data_wait``, a share in [0, 1]; reset both."""
        seconds = {prefix: max(value, 1e-9) for prefix, value in self._seconds.items()}
        speeds = {f"{p}examples_per_second": self._examples[p] / seconds[p] for p in seconds}
        share = self._waited / seconds.get("", 1e-9)
        self._seconds, self._examples, self._waited = {}, {}, 0.0
        return {**speeds, "data_wait": share}


class LoggingCallback(Callback):
    """Writes a ``train`` record (deterministic) and a ``timing`` record (not) at intervals.

    Values are means over the interval's updates that have them. If updates have labels (the objectives of a mixture),
    a record holds each label's values and number of ``updates``, and overall only ``loss`` and ``gradient_norm``.

    Args:
        trackers: receive the records.
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

    def on_update(self, training: Training, logs: Logs) -> None:
        """Accumulate the update's values; write them when due."""
        label = training.stream.label
        self._means.add(logs, label)
        self._speed.add(training.seconds, training.stream.waited, training.examples, label)
        if training.progress.update % self.every == 0 or training.progress.finished:
            self.write(training)

    def write(self, training: Training) -> None:
        """Write the means since the last record, if there are any."""
        if not self._means:
            return
        update = training.progress.update
        groups = training.updater.optimizer.param_groups
        rate = min(groups, key=lambda group: abs(group["lr_multiplier"] - 1))["lr"]
        means = self._means.take()
        self.trackers.log(update, "train", {**means, "learning_rate": rate, **_rates(groups)})
        timing = {"seconds": training.seconds + training.stream.waited, **self._speed.take(), **_memory(training)}
        self.trackers.log(update, "timing", timing)
        self.progress.advance(update, {**means, **timing}, best=training.progress.best)

    def on_end(self, training: Training) -> None:
        """Close the progress display."""
        self.progress.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return the means of the current interval and the positions in the log files."""
        return {"means": self._means.state_dict(), "trackers": self.trackers.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict()``, truncating later records in the log."""
        self._means.load_state_dict(state["means"])
        self.trackers.load_state_dict(state["trackers"])


def _rates(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the learning rate of the groups of each multiplier, if there are several: ``learning_rate/10x``."""
    rates = {f"learning_rate/{group['lr_multiplier']:.3g}x": group["lr"] for group in groups}
    return rates if len(rates) > 1 else {}


def _memory(training: Training) -> dict[str, float]:
    """Return the largest memory that tensors on the GPU have taken so far, in GiB; nothing on a CPU."""
    device = next(training.model.parameters()).device
    return {"memory_gib": torch.cuda.max_memory_allocated(device) / 2**30} if device.type == "cuda" else {}


class LastIntervalCallback(Callback):
    """Writes the records of an interval that early stopping cuts short.

    It must come after the callback that stops the run and before the one that saves checkpoints, so that a resumed run
    does not write them again.

    Args:
        logging: callback with the values.
    """

    name = "last_interval"

    def __init__(self, logging: LoggingCallback) -> None:
        self.logging = logging

    def on_update(self, training: Training, logs: Logs) -> None:
        """Write the records if the run has been stopped."""
        if training.progress.stopped is not None:
            self.logging.write(training)
