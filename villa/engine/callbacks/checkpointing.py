"""Checkpoints during training, also when a signal ends the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from villa.checkpoints import files as checkpoint_files
from villa.checkpoints.store import CheckpointStore
from villa.checkpoints.tensors import staged
from villa.distributed.processes import Processes
from villa.engine.loop import Callback, Training
from villa.errors import CheckpointError
from villa.signals import deferred
from villa.trainers.base import Logs

#: Writes a process's files into a folder and returns their listing.
_Write = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class _UnderWay:
    """A checkpoint being written; ``files`` waits for this process's files."""

    update: int
    best: bool
    files: Callable[[], dict[str, Any]]
    future: Future[dict[str, Any]] | None


class CheckpointCallback(Callback):
    """Saves at intervals, at a new best, at the end, and before a signal ends the run.

    It must come after every callback whose state it saves.

    Args:
        store: the run's checkpoints.
        every: updates between checkpoints; None saves only on the other occasions.
        config_yaml: the resolved recipe, saved beside the weights.
        assets: writes the data set's vocabulary and labels into a folder.
        provenance: fingerprint of the data, versions; saved with the state.
        sharded: every process writes its own shard, instead of rank 0 everything.
        asynchronous: write copies of the tensors in a thread during training. The next checkpoint, a signal and the end
            wait for it. Processes agree on completion between updates, never in the thread.

    Raises:
        ConfigError: torch is too old for checkpoint shards.
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
        sharded: bool = False,
        asynchronous: bool = False,
    ) -> None:
        self.store, self.every = store, every
        self.config_yaml, self.assets, self.provenance = config_yaml, assets, dict(provenance)
        self.sharded, self.asynchronous = sharded, asynchronous
        self._under_way: _UnderWay | None = None
        if sharded:
            import villa.checkpoints.shards  # noqa: F401 - refuses an old torch now

    def on_update(self, training: Training, logs: Logs) -> None:
        """Save when due; publish a checkpoint once it is complete."""
        progress, processes = training.progress, training.updater.strategy.processes
        periodic = self.every is not None and progress.update % self.every == 0
        is_best = progress.best_update == progress.update
        last = progress.finished or training.interrupt is not None
        due = periodic or is_best or last
        if self._under_way is not None and (due or self._written(self._under_way, processes)):
            self._finish(training)
        if due:
            self._begin(training, is_best)
            if last or not self.asynchronous:
                self._finish(training)

    def on_end(self, training: Training) -> None:
        """Finish what needs no communication: after an error, other processes may be anywhere."""
        under_way, self._under_way = self._under_way, None
        processes = training.updater.strategy.processes
        if under_way is None or not processes.is_main:
            return
        try:
            if processes.world_size == 1 or not self.sharded:
                self.store.publish(under_way.update, under_way.files(), best=under_way.best)
        except CheckpointError as error:
            print(error, flush=True)  # another error is already ending the run
        finally:
            self.store.discard(under_way.update)

    def _begin(self, training: Training, is_best: bool) -> None:
        """Collect the state and start writing it."""
        update, processes = training.progress.update, training.updater.strategy.processes
        write = self._of_shards(training) if self.sharded else self._of_whole(training)
        if processes.is_main:
            self.store.begin(update, self.config_yaml, self.assets)
        if self.sharded:
            processes.barrier()  # until the folder exists

        def run() -> dict[str, Any]:
            with self.store.writing(update):
                return write(self.store.unfinished(update))

        future = _in_thread(run) if self.asynchronous else None
        self._under_way = _UnderWay(update, is_best, future.result if future else run, future)

    def _of_whole(self, training: Training) -> _Write:
        """Gather the state on rank 0, which writes all of it."""
        strategy = training.updater.strategy
        weights, state = strategy.state_dict(training.model), training.state_dict()
        if not strategy.processes.is_main:
            return lambda folder: {}
        if self.asynchronous:
            weights, state = staged((weights, state))

        def write(folder: Path) -> dict[str, Any]:
            checkpoint_files.write_whole(folder, weights, {**state, "provenance": self.provenance})
            return checkpoint_files.listed(folder)

        return write

    def _of_shards(self, training: Training) -> _Write:
        """Prepare a shard per process; rank 0 also writes the rest of the state."""
        from villa.checkpoints.shards import part_of, split_kept, split_optimizer

        strategy, state = training.updater.strategy, training.state_dict(whole=False)
        updater, kept = split_kept(state["updater"])
        optimizer, moments = split_optimizer(updater["optimizer"])
        part = part_of(training.model, moments, strategy.share, copy=self.asynchronous, kept=kept)
        small = {**state, "updater": {**updater, "optimizer": optimizer}}
        state = staged({**small, "provenance": self.provenance})

        def write(folder: Path) -> dict[str, Any]:
            files = checkpoint_files.listed(folder, part.write(folder))
            if strategy.processes.is_main:
                checkpoint_files.write_training_state(folder, state)
                files |= checkpoint_files.listed(folder)
            return files

        return write

    def _written(self, under_way: _UnderWay, processes: Processes) -> bool:
        """Return whether all processes have written their files, or failed."""
        done = under_way.future is None or under_way.future.done()
        return processes.total([float(done)]) == [processes.world_size]

    def _finish(self, training: Training) -> None:
        """Wait for all files and publish the checkpoint.

        Raises:
            CheckpointError: a process could not write its files; raised on all processes.
        """
        under_way, self._under_way = self._under_way, None
        processes = training.updater.strategy.processes
        assert under_way is not None
        files, problem = {}, None
        try:
            files = under_way.files()
        except CheckpointError as error:
            problem = str(error)
        found = processes.gather([files, problem])
        problem = next((theirs for _, theirs in found if theirs), None)
        try:
            if problem is not None:
                raise CheckpointError(problem)
            if processes.is_main:
                listed = {name: about for theirs, _ in found for name, about in theirs.items()}
                self.store.publish(under_way.update, listed, best=under_way.best)
        finally:
            if processes.is_main:
                self.store.discard(under_way.update)
        training.saved(self.store.path(under_way.update))


def _in_thread(run: Callable[[], dict[str, Any]]) -> Future[dict[str, Any]]:
    pool = ThreadPoolExecutor(1, "checkpoint")
    try:
        return pool.submit(run)
    finally:
        pool.shutdown(wait=False)


class SignalCallback(Callback):
    """Defers signals from the first update on; ``training.check`` ends the run.

    It must come after the checkpoint callback, which saves if ``training.interrupt`` is set.

    Args:
        saving: the checkpoint callback; None does not save after an interrupted update.
    """

    name = "signals"

    def __init__(self, saving: Callback | None = None) -> None:
        self.saving = saving
        self._noting = ExitStack()
        self._begun = 0

    def on_start(self, training: Training) -> None:
        """Start deferring signals."""
        self._begun = training.progress.update
        self._noting.enter_context(deferred())

    def on_update(self, training: Training, logs: Logs) -> None:
        """End a run whose evaluation was interrupted by a signal."""
        if training.interrupt is not None:
            training.check()

    def on_interrupt(self, training: Training) -> None:
        """Save the state, unless no update has been done since the start."""
        if self.saving is not None and training.progress.update > self._begun:
            self.saving.on_update(training, {})

    def on_end(self, training: Training) -> None:
        """Stop deferring signals."""
        self._noting.close()
