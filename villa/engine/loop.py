"""The training loop and its state."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from villa.datasets.stream import UpdateStream
from villa.engine.updater import Updater
from villa.json_values import is_count
from villa.models.base import Model
from villa.signals import SIGNALS, Interrupted, urgency
from villa.trainers.base import Logs


@dataclass
class CallbackConfig:
    """Options that every callback has: none."""


class Callback:
    """A hook around updates; registered callbacks are named in ``callbacks``, others are passed to ``villa.train``.

    It runs on every process, at the same places.

    Args:
        config: its options.

    Attributes:
        name: keys its state in checkpoints; of registered callbacks, it is the registered name.
    """

    Config: ClassVar[type[Any]] = CallbackConfig
    config: Any
    name = "callback"

    def __init__(self, config: Any = None) -> None:
        self.config = config if config is not None else self.Config()

    def on_start(self, training: Training) -> None:
        """Run once, after a checkpoint was loaded and before the first update."""

    def on_update(self, training: Training, logs: Logs) -> None:
        """Run after every update, with its detached values; set ``training.progress.stopped`` to end the run."""

    def on_evaluation(self, training: Training, values: Mapping[str, float]) -> None:
        """Run after every evaluation on the validation split, with its values, and before ``on_update``."""

    def on_checkpoint(self, training: Training, folder: Path) -> None:
        """Run when a checkpoint is complete; processes but the first may run it before ``folder`` has its name."""

    def on_interrupt(self, training: Training) -> None:
        """Run when a signal arrives during an update, which has been undone."""

    def on_end(self, training: Training) -> None:
        """Run once when training ends, even by an error or a signal."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs; saved in every checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict()``."""


T = TypeVar("T")


@dataclass
class Progress:
    """The progress of training.

    Attributes:
        update: updates done.
        total: updates to do.
        stopped: why training ended early, or None.
        best: the best value of the monitored metric so far.
        best_update: the update of ``best``.
        pending: name of the callback that a signal interrupted after ``update``; a resumed run starts with it.
    """

    update: int = 0
    total: int = 0
    stopped: str | None = None
    best: float | None = None
    best_update: int | None = None
    pending: str | None = None

    def check(self) -> None:
        """Check that the values are possible: a damaged checkpoint may hold others.

        Raises:
            ValueError: a value is impossible.
        """
        counts = [self.update, *([] if self.best_update is None else [self.best_update])]
        known = isinstance(self.best, int | float) if self.best_update is not None else self.best is None  # may be NaN
        if not all(map(is_count, counts)) or not known or not isinstance(self.pending, str | None):
            raise ValueError(f"there is no such state of a run: {self!r:.200}")

    @property
    def finished(self) -> bool:
        """Whether training is done or was stopped."""
        return self.update >= self.total or self.stopped is not None


@dataclass
class Training:
    """Everything that ``fit`` works on.

    Attributes:
        model: the model.
        updater: runs an optimiser step on micro-batches.
        stream: endless iterator over the micro-batches of each update.
        prepare: moves a micro-batch to the model's device.
        callbacks: called in order around every update.
        progress: updates done and the best result so far.
        seconds: time spent in updates since this process started.
        examples: examples seen since this process started, by all processes of the run.
        interrupt: number of the signal that ends the run, or None; the same on all processes.
    """

    model: Model
    updater: Updater
    stream: UpdateStream
    prepare: Callable[[Any], Any]
    callbacks: Sequence[Callback]
    progress: Progress = field(default_factory=Progress)
    seconds: float = 0.0
    examples: int = 0
    interrupt: int | None = None

    def check(self) -> None:
        """Stop all processes if one has received a signal; all call it at the same places.

        Raises:
            Interrupted: a process has received a signal.
        """
        if self.interrupt is None:
            strongest = self.updater.strategy.processes.largest(urgency())
            self.interrupt = SIGNALS[strongest - 1] if strongest else None
        if self.interrupt is not None:
            where = f" after update {self.progress.update}; go on with checkpoint.resume=true"
            raise Interrupted(self.interrupt, where, agreed=True)

    def evaluated(self, values: Mapping[str, float]) -> None:
        """Tell the callbacks what an evaluation has found."""
        for callback in self.callbacks:
            callback.on_evaluation(self, values)

    def saved(self, folder: Path) -> None:
        """Tell the callbacks that a checkpoint is complete."""
        for callback in self.callbacks:
            callback.on_checkpoint(self, folder)

    def checked(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, checking for signals before each; every process has the same number of items."""
        for item in items:
            self.check()
            yield item

    def state_dict(self, *, whole: bool = True) -> dict[str, Any]:
        """Return what an exact resume needs besides the weights; see ``Updater.state_dict``."""
        return {
            "progress": asdict(self.progress),
            "updater": self.updater.state_dict(whole=whole),
            "stream": dict(self.stream.position),
            "callbacks": {callback.name: callback.state_dict() for callback in self.callbacks},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``, except the number of updates and the reason for stopping, which are this run's own.

        Raises:
            CheckpointError: the state belongs to another recipe.
            ValueError: the state is malformed; the caller must translate other errors that a malformed state causes.
        """
        self.progress = Progress(**{**state["progress"], "total": self.progress.total, "stopped": None})
        self.progress.check()
        self.updater.load_state_dict(state["updater"])
        if self.progress.update:
            self.updater.schedule.apply(self.updater.optimizer, self.progress.update)  # for the rate in the log
        self.stream.seek(state["stream"])
        for callback in self.callbacks:
            callback.load_state_dict(state["callbacks"].get(callback.name, {}))


def fit(training: Training) -> None:
    """Train until all updates are done or a callback stops the run.

    Raises:
        Interrupted: a signal has ended the run; its state has been saved.
    """
    progress = training.progress
    try:
        for callback in training.callbacks:
            callback.on_start(training)
        training.model.train()
        if progress.pending is not None:
            _end_update(training, {}, first=progress.pending)
        while not progress.finished:
            logs = _update(training)
            _end_update(training, logs)
    finally:
        for callback in training.callbacks:
            callback.on_end(training)
        training.stream.close()


def _update(training: Training) -> Logs:
    """Run the next update and return its values to log; a signal restores the state before it."""
    progress, stream = training.progress, training.stream
    position = stream.position
    try:
        batches = [training.prepare(batch) for batch in next(stream)]
        training.check()
        started = time.perf_counter()
        logs = training.updater.update(progress.update + 1, batches, stream.turns, training.check)
    except Interrupted:
        stream.seek(position)
        for callback in training.callbacks:
            callback.on_interrupt(training)
        raise
    progress.update += 1
    training.seconds += time.perf_counter() - started
    training.examples += stream.examples
    return logs


def _end_update(training: Training, logs: Logs, first: str | None = None) -> None:
    """Run the callbacks at the end of an update; after an interruption, start with ``first``."""
    training.progress.pending = None
    names = [callback.name for callback in training.callbacks]
    begin = 0 if first is None else names.index(first) if first in names else len(names)
    for callback in training.callbacks[begin:]:
        callback.on_update(training, logs)
