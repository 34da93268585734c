"""Training: the loop, and the state that it carries."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from villa.datasets.stream import UpdateStream
from villa.engine.callbacks.base import Callback
from villa.engine.updater import Updater
from villa.models.base import Model


@dataclass
class Progress:
    """Where training stands.

    Attributes:
        update: updates done.
        total: updates to do.
        stopped: why training ended early, or None.
        best: the best value of the monitored metric so far, and the update that it was reached at.
        best_update: the update of ``best``.
    """

    update: int = 0
    total: int = 0
    stopped: str | None = None
    best: float | None = None
    best_update: int | None = None

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.update >= self.total or self.stopped is not None


@dataclass
class Training:
    """A training run: everything that ``fit`` works on.

    Attributes:
        model: the model.
        updater: turns micro-batches into an optimiser step.
        stream: the endless sequence of updates' micro-batches.
        prepare: moves a micro-batch to the model's device.
        callbacks: called in order around every update.
        progress: where training stands.
        seconds: time spent in updates since this process started.
        examples: examples seen since this process started, by all processes of the run.
        received: number of the signal that this process has received, or None.
        interrupt: number of the signal that asks the run to end, or None; all processes of the run have the same.
    """

    model: Model
    updater: Updater
    stream: UpdateStream
    prepare: Callable[[Any], Any]
    callbacks: Sequence[Callback]
    progress: Progress = field(default_factory=Progress)
    seconds: float = 0.0
    examples: int = 0
    received: int | None = None
    interrupt: int | None = None

    def receive(self, number: int) -> None:
        """Take in a signal; several processes end after the update at which all of them know of it."""
        self.received = number
        if self.updater.strategy.processes.world_size == 1:
            self.interrupt = number

    def state_dict(self, *, whole: bool = True) -> dict[str, Any]:
        """Everything besides the weights that an exact resume needs; see ``Updater.state_dict``."""
        return {
            "progress": asdict(self.progress),
            "updater": self.updater.state_dict(whole=whole),
            "stream": dict(self.stream.position),
            "callbacks": {callback.name: callback.state_dict() for callback in self.callbacks},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``; the updates to do, and whether to stop before, are this run's own affair."""
        self.progress = Progress(**{**state["progress"], "total": self.progress.total, "stopped": None})
        self.updater.load_state_dict(state["updater"])
        self.stream.seek(state["stream"])
        for callback in self.callbacks:
            callback.load_state_dict(state["callbacks"].get(callback.name, {}))


def fit(training: Training) -> None:
    """Train until all updates are done or a callback stops the run."""
    progress, processes = training.progress, training.updater.strategy.processes
    try:
        for callback in training.callbacks:
            callback.on_start(training)
        training.model.train()
        while not progress.finished:
            batches = [training.prepare(batch) for batch in next(training.stream)]
            started = time.perf_counter()
            progress.update += 1
            logs = training.updater.update(progress.update, batches, training.stream.turns)
            training.seconds += time.perf_counter() - started
            training.examples += training.stream.examples
            if processes.world_size > 1:
                training.interrupt = processes.largest(training.received or 0) or None
            for callback in training.callbacks:
                callback.on_update_end(training, logs)
    finally:
        for callback in training.callbacks:
            callback.on_end(training)
        training.stream.close()
