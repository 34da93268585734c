"""Evaluation during training, the best update so far, and early stopping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from villa.batch import Batch
from villa.config.schema import EvaluationConfig
from villa.datasets.stream import StandIn
from villa.engine.evaluator import Evaluator
from villa.engine.loop import Callback, Progress, Training
from villa.errors import ConfigError, nearest
from villa.progress import TrainingProgress
from villa.signals import Interrupted
from villa.tracking import Trackers
from villa.trainers.base import Logs


class Batches(Protocol):
    """Iterates over a split's batches anew with every call."""

    def __call__(self, first: bool = False) -> Iterable[Batch | StandIn]:
        """Return all batches, or only the first of each part of a mixture."""


class EvaluationCallback(Callback):
    """Evaluates at intervals and at the end, tracks the best update, and stops when there is no more progress.

    With ``training.ema``, it evaluates the running average of the weights; values of the weights themselves are called
    ``live_<name>``.

    Args:
        evaluator: scores the batches.
        batches: iterates over the validation split's batches.
        config: interval, monitored metric and patience.
        trackers: receive a ``val`` record per evaluation.
        display: shows the values.
        attack: returns values under attack by name, when they are due.
    """

    name = "evaluation"

    def __init__(
        self,
        evaluator: Evaluator,
        batches: Batches,
        config: EvaluationConfig,
        trackers: Trackers,
        display: TrainingProgress,
        attack: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        self.evaluator, self.batches, self.config, self.attack = evaluator, batches, config, attack
        self.trackers, self.display = trackers, display
        self.without_improvement = 0
        self.values: dict[str, float] = {}

    def on_start(self, training: Training) -> None:
        """Evaluate one batch of every part, to find unsuitable metrics early; stop a run that had already stopped.

        Raises:
            ConfigError: no metric has the monitored value.
            DataError: the targets are missing, or unsuitable for the loss or a metric.
        """
        values = self.evaluator.evaluate(self.batches(first=True))
        if self.attack is None or not self.config.monitor.startswith("robust_"):
            self._monitored(values)
        self._stop_without_patience(training)

    def on_update(self, training: Training, logs: Logs) -> None:
        """Evaluate when due; a run resumed after a signal repeats an interrupted evaluation."""
        progress = training.progress
        due = self.config.every is not None and progress.update % self.config.every == 0
        if not (due or progress.finished):
            return
        try:
            self.values = self._evaluate(training)
        except Interrupted:
            progress.pending = self.name
            return
        self.trackers.log(progress.update, "val", self.values)
        self.display.evaluated(progress.update, str(self.config.split), self.values)
        self._judge(training, self._monitored(self.values))
        training.evaluated(self.values)
        self._stop_without_patience(training)

    def state_dict(self) -> dict[str, Any]:
        """Return the evaluations without progress and the last values."""
        return {"without_improvement": self.without_improvement, "values": dict(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict()``."""
        self.without_improvement = int(state.get("without_improvement", 0))
        self.values = {str(name): float(value) for name, value in state.get("values", {}).items()}

    def _attacks_at(self, progress: Progress) -> bool:
        every = self.config.robustness.every
        return every is None or progress.update % every == 0 or progress.finished

    def _evaluate(self, training: Training) -> dict[str, float]:
        with training.updater.averaged():
            values = self.evaluator.evaluate(training.checked(self.batches()))
            if self.attack is not None and self._attacks_at(training.progress):
                training.check()
                values |= self.attack()
        if training.updater.ema is not None:
            live = self.evaluator.evaluate(training.checked(self.batches()))
            values |= {f"live_{name}": value for name, value in live.items()}
        return values

    def _monitored(self, values: Mapping[str, float]) -> float:
        if self.config.monitor not in values:
            hint = nearest(self.config.monitor, values)
            raise ConfigError(f"evaluation.monitor: no value '{self.config.monitor}' among {', '.join(values)}{hint}")
        return values[self.config.monitor]

    def _judge(self, training: Training, value: float) -> None:
        progress = training.progress
        sign = 1 if self.config.mode == "max" else -1
        if progress.best is None or sign * value > sign * progress.best:
            progress.best, progress.best_update = value, progress.update
            self.without_improvement = 0
        else:
            self.without_improvement += 1

    def _stop_without_patience(self, training: Training) -> None:
        progress, patience = training.progress, self.config.patience
        if patience is not None and progress.best is not None and self.without_improvement >= patience:
            progress.stopped = (
                f"{self.config.monitor} has not improved in {self.without_improvement} evaluations "
                f"(best {progress.best:.4g} at update {progress.best_update})"
            )
