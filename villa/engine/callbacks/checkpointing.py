"""Saving checkpoints while training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from villa.engine.callbacks.base import Callback
from villa.engine.checkpoint import CheckpointStore
from villa.engine.training import Training
from villa.trainers.base import Logs


class CheckpointCallback(Callback):
    """Saves every so many updates, at a new best, at the end, and before a signal ends the run.

    It stands after every callback whose state it saves.

    Args:
        store: where checkpoints go.
        every: updates between checkpoints; None saves on the other occasions only.
        config_yaml: the resolved recipe, saved beside the weights.
        assets: writes the data set's vocabulary and labels into a folder.
        provenance: fingerprint of the data, versions; saved with the state.
    """

    name = "checkpoint"

    def __init__(
        self,
        store: CheckpointStore,
        every: int | None,
        *,
        config_yaml: str,
        assets: Callable[[Path], None],
        provenance: Mapping[str, Any],
    ) -> None:
        self.store, self.every = store, every
        self.config_yaml, self.assets, self.provenance = config_yaml, assets, dict(provenance)

    def on_update_end(self, training: Training, logs: Logs) -> None:
        """Save when it is due."""
        progress = training.progress
        periodic = self.every is not None and progress.update % self.every == 0
        is_best = progress.best_update == progress.update
        if periodic or is_best or progress.finished or training.interrupt is not None:
            self._save(training, is_best)

    def _save(self, training: Training, is_best: bool) -> None:
        """Collect the state of all processes, and write it on the main one."""
        strategy = training.updater.strategy
        weights, state = strategy.state_dict(training.model), training.state_dict()
        if strategy.processes.is_main:
            self.store.save(
                training.progress.update,
                weights,
                {**state, "provenance": self.provenance},
                config_yaml=self.config_yaml,
                assets=self.assets,
                best=is_best,
            )
