"""Saving checkpoints while training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from villa.checkpoints import files as checkpoint_files
from villa.checkpoints.store import CheckpointStore
from villa.checkpoints.tensors import staged
from villa.distributed.processes import Processes
from villa.engine.loop import Callback, Training
from villa.errors import CheckpointError
from villa.signals import deferred
from villa.trainers.base import Logs

if TYPE_CHECKING:
    from villa.engine.loop import Training


#: Writes what a process has to write into a folder, and returns a listing of it.
_Write = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class _UnderWay:
    """A checkpoint that is being written: of an update, perhaps the best; ``files`` waits for this process's files."""

    update: int
    best: bool
    files: Callable[[], dict[str, Any]]
    future: Future[dict[str, Any]] | None


class CheckpointCallback(Callback):
    """Saves every so many updates, at a new best, at the end, and before a signal ends the run.

    It stands after every callback whose state it saves.

    Args:
        store: where checkpoints go.
        every: updates between checkpoints; None saves on the other occasions only.
        config_yaml: the resolved recipe, saved beside the weights.
        assets: writes the data set's vocabulary and labels into a folder.
        provenance: fingerprint of the data, versions; saved with the state.
        sharded: every process writes what it has, instead of the main one all.
        asynchronous: write copies of the tensors in a thread while training goes on. The next checkpoint, a signal and
            the end wait for it. Processes agree between updates, never in the thread, that all of them are done.

    Raises:
        ConfigError: torch is too old for shards.
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
            import villa.checkpoints.shards  # noqa: F401 - a torch that is too old is refused now

    def on_update_end(self, training: Training, logs: Logs) -> None:
        """Save when it is due; give a checkpoint that is complete its name."""
        progress, processes = training.progress, training.updater.strategy.processes
        periodic = self.every is not None and progress.update % self.every == 0
        is_best = progress.best_update == progress.update
        last = progress.finished or training.interrupt is not None
        due = periodic or is_best or last
        if self._under_way is not None and (due or self._written(self._under_way, processes)):
            self._finish(processes)
        if due:
            self._begin(training, is_best)
            if last or not self.asynchronous:
                self._finish(processes)

    def on_end(self, training: Training) -> None:
        """After an error, finish what needs no other process: they may be anywhere."""
        under_way, self._under_way = self._under_way, None
        processes = training.updater.strategy.processes
        if under_way is None or not processes.is_main:
            return
        try:
            if processes.world_size == 1 or not self.sharded:
                self.store.publish(under_way.update, under_way.files(), best=under_way.best)
        except CheckpointError as error:
            print(error, flush=True)  # the other error is the one that ends the run
        finally:
            self.store.discard(under_way.update)

    def _begin(self, training: Training, is_best: bool) -> None:
        """Collect the state, and let it be written."""
        update, processes = training.progress.update, training.updater.strategy.processes
        write = self._of_shards(training) if self.sharded else self._of_whole(training)
        if processes.is_main:
            self.store.begin(update, self.config_yaml, self.assets)
        if self.sharded:
            processes.barrier()  # the folder is there

        def run() -> dict[str, Any]:
            with self.store.writing(update):
                return write(self.store.unfinished(update))

        future = _in_thread(run) if self.asynchronous else None
        self._under_way = _UnderWay(update, is_best, future.result if future else run, future)

    def _of_whole(self, training: Training) -> _Write:
        """The main process writes the state of all; all put it together."""
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
        """Every process writes its part, and the main one what is small."""
        from villa.checkpoints.shards import part_of, split_optimizer, split_trainer

        strategy, state = training.updater.strategy, training.state_dict(whole=False)
        updater = state["updater"]
        optimizer, moments = split_optimizer(updater["optimizer"])
        trainer, kept = split_trainer(updater["trainer"])
        part = part_of(training.model, moments, strategy.share, copy=self.asynchronous, trainer=kept)
        small = {**state, "updater": {**updater, "optimizer": optimizer, "trainer": trainer}}
        state = staged({**small, "provenance": self.provenance})

        def write(folder: Path) -> dict[str, Any]:
            files = checkpoint_files.listed(folder, part.write(folder))
            if strategy.processes.is_main:
                checkpoint_files.write_training_state(folder, state)
                files |= checkpoint_files.listed(folder)
            return files

        return write

    def _written(self, under_way: _UnderWay, processes: Processes) -> bool:
        """Whether all processes have written their files, or failed to."""
        done = under_way.future is None or under_way.future.done()
        return processes.total([float(done)]) == [processes.world_size]

    def _finish(self, processes: Processes) -> None:
        """Wait for all files, and give the checkpoint its name.

        Raises:
            CheckpointError: on all processes, when one could not write its files.
        """
        under_way, self._under_way = self._under_way, None
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


def _in_thread(run: Callable[[], dict[str, Any]]) -> Future[dict[str, Any]]:
    pool = ThreadPoolExecutor(1, "checkpoint")
    try:
        return pool.submit(run)
    finally:
        pool.shutdown(wait=False)


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
