"""The checkpoints of a run: each is complete or absent, whenever the process is killed.

``<folder>/update_00000100/`` holds ``model.safetensors`` (or ``shards/`` and ``shards.json``), ``training_state.pt``,
``config.yaml``, ``assets/`` and ``manifest.json`` with the size and SHA-256 of all of them. It is written under another
name, flushed to the disk and renamed. ``best.json`` beside the checkpoints names the best one.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from villa.checkpoints import files as checkpoint_files
from villa.checkpoints.files import Checkpoint, load
from villa.checkpoints.layout import CHECKPOINTS, MANIFEST
from villa.errors import CheckpointError, ConfigError, one_line, reading
from villa.files import fsync, no_space, write_json
from villa.json_values import is_count, read_own

__all__ = ["Checkpoint", "CheckpointStore", "load", "resolve"]

_LOG = logging.getLogger(__name__)

_BEST = "best.json"
_NAME = re.compile(r"update_(\d{8,})")
# Unfinished work by its prefix: being written; about to be replaced by a rename; being deleted.
_SAVING, _REPLACED, _REMOVED = ".saving-", ".replaced-", ".removed-"


class CheckpointStore:
    """The checkpoints in one folder. Only one process may write to it at a time.

    Args:
        folder: the folder, created on the first save.
        keep: number of newest checkpoints to keep besides the best; at least 1.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        if keep < 1:
            raise ConfigError(f"checkpoint.keep is {keep}; give 1 or more")
        self.folder = folder
        self.keep = keep
        self._made = False

    def path(self, update: int) -> Path:
        """Return the folder of the checkpoint of ``update``."""
        return self.folder / f"update_{update:08d}"

    def updates(self) -> list[int]:
        """Return the updates with a checkpoint, even a damaged one, in ascending order."""
        matches = (_NAME.fullmatch(path.name) for path in self.folder.glob("update_*") if path.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def save(
        self,
        update: int,
        model_state: Mapping[str, Tensor],
        training_state: Mapping[str, Any],
        *,
        config_yaml: str,
        assets: Callable[[Path], None] | None = None,
        best: bool = False,
    ) -> Path:
        """Save a checkpoint, replacing one of the same update; then prune old ones.

        Args:
            update: updates completed.
            model_state: the weights by name; tied and non-contiguous ones are fine.
            training_state: nested dicts, lists and tuples of tensors, numbers, text and None.
            config_yaml: the run's resolved recipe.
            assets: writes the data set's files into an empty folder.
            best: this checkpoint is the best so far.

        Returns:
            Its folder.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written; earlier checkpoints are intact.
            TypeError: ``training_state`` holds an object that could not be loaded again.
        """
        try:
            folder = self.begin(update, config_yaml, assets)
            with self.writing(update):
                checkpoint_files.write_whole(folder, model_state, training_state)
                files = checkpoint_files.listed(folder)
            return self.publish(update, files, best=best)
        finally:
            self.discard(update)

    def unfinished(self, update: int) -> Path:
        """Return the folder that a checkpoint is written to before ``publish`` renames it."""
        return self.folder / f"{_SAVING}{self.path(update).name}"

    def begin(self, update: int, config_yaml: str, assets: Callable[[Path], None] | None = None) -> Path:
        """Create the folder that a checkpoint is written to, with its small files; see ``save``."""
        folder = self.unfinished(update)
        self.discard(update)
        try:
            with self.writing(update):
                if not self._made:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    self._made = True
                folder.mkdir()  # without parents: fail if they were removed during the run
                checkpoint_files.write_recipe(folder, config_yaml, assets)
        except BaseException:
            self.discard(update)
            raise
        return folder

    def publish(self, update: int, files: Mapping[str, Any], *, best: bool = False) -> Path:
        """Rename a checkpoint whose files are on the disk to its final name; then prune old ones.

        Args:
            update: the update given to ``begin``.
            files: all its files, as listed by ``checkpoint_files.listed``.
            best: this checkpoint is the best so far.

        Returns:
            Its folder.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        target = self.path(update)
        replaced = self.folder / f"{_REPLACED}{target.name}"
        with self.writing(update):
            checkpoint_files.write_manifest(self.unfinished(update), update, files=files)
            if target.exists():
                target.rename(replaced)  # clean() restores it if the next line is never reached
            self.unfinished(update).rename(target)
            fsync(self.folder)
            shutil.rmtree(replaced, ignore_errors=True)
        if best:
            self.set_best(update)
        self.prune(update)
        return target

    def discard(self, update: int) -> None:
        """Delete an unpublished checkpoint."""
        shutil.rmtree(self.unfinished(update), ignore_errors=True)

    def writing(self, update: int) -> AbstractContextManager[None]:
        """Return a context that turns errors of writing a checkpoint into ``CheckpointError``."""
        return _one_line_errors(f"the checkpoint of update {update} cannot be saved in '{self.folder}'", self.folder)

    def newest(self) -> Checkpoint | None:
        """Return the newest intact checkpoint; warn of each damaged one that is skipped.

        Call ``clean`` before: it may restore a checkpoint that was being replaced.
        """
        for update in reversed(self.updates()):
            try:
                return self.load(update)
            except CheckpointError as error:
                _LOG.warning("%s", error)
        return None

    def load(self, update: int, *, verified: bool = False) -> Checkpoint:
        """Return the checkpoint of ``update`` after verifying its files, unless they are ``verified`` already.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        checkpoint = load(self.path(update), verified=verified)
        if checkpoint.update != update:
            raise CheckpointError(
                f"checkpoint '{checkpoint.path}' is damaged: its manifest is that of update {checkpoint.update}; "
                "use another one"
            )
        return checkpoint

    def best(self) -> int | None:
        """Return the update of the best checkpoint, or None if unknown."""
        path = self.folder / _BEST
        if not path.exists():
            return None
        try:
            with reading(f"'{path}' does not say which checkpoint is the best", "the newest is taken", CheckpointError):
                update = read_own(path)["update"]
                if is_count(update):
                    return update
                raise ValueError(f"its update is {update!r:.40}")
        except CheckpointError as error:
            _LOG.warning("%s", error)
            return None

    def set_best(self, update: int | None) -> None:
        """Record the best checkpoint, or with None that there is none. A resumed run restores its record.

        A best checkpoint that is gone (deleted for a better one, which was then damaged) is dropped with a warning.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        if update is not None and not self.path(update).is_dir():
            _LOG.warning("the best checkpoint, of update %d, is not in '%s' any more", update, self.folder)
            update = None
        with _one_line_errors(f"'{self.folder / _BEST}' cannot be written", self.folder):
            if update is None:
                (self.folder / _BEST).unlink(missing_ok=True)
            else:
                write_json(self.folder / _BEST, {"update": update})

    def prune(self, update: int) -> None:
        """Delete all checkpoints up to ``update`` except the newest ``keep`` of them and the best.

        Later ones (damaged, and skipped when the run was resumed) stay until the run replaces them.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        past = [other for other in self.updates() if other <= update]
        with _one_line_errors(f"old checkpoints cannot be deleted from '{self.folder}'", self.folder):
            for other in sorted({*past[: -self.keep]} - {self.best()}):
                self._delete(self.path(other))

    def _delete(self, path: Path) -> None:
        removed = self.folder / f"{_REMOVED}{path.name}"
        shutil.rmtree(removed, ignore_errors=True)
        path.rename(removed)  # so that a half-deleted checkpoint never has its name
        shutil.rmtree(removed)

    def clean(self) -> None:
        """Clean up after a killed process. Call it before the first save of a run.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        with _one_line_errors(f"left-over files cannot be deleted from '{self.folder}'", self.folder):
            for replaced in self.folder.glob(f"{_REPLACED}*"):
                target = self.folder / replaced.name.removeprefix(_REPLACED)
                if not target.exists():
                    replaced.rename(target)
            for prefix in (_SAVING, _REPLACED, _REMOVED):
                for path in self.folder.glob(f"{prefix}*"):
                    shutil.rmtree(path)
            for path in self.folder.glob(f".{_BEST}.*.tmp"):
                path.unlink()


@contextmanager
def _one_line_errors(what: str, folder: Path) -> Iterator[None]:
    """Turn errors of the file system (and safetensors' and torch's for a full disk) into ``CheckpointError``."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        full = no_space(error)
        reason = one_line(error) if full is None else f"{full} in '{folder}'"
        raise CheckpointError(
            f"{what}: {reason}; earlier checkpoints are intact: free space or choose another output_dir, and "
            "go on with checkpoint.resume=true"
        ) from error


def resolve(path: Path) -> Path:
    """Return the folder of the checkpoint that a user's path refers to.

    Args:
        path: a checkpoint, a folder of checkpoints, or a run's output folder. Of several, the best checkpoint is
            chosen, or the newest intact one if the best is unknown.

    Returns:
        The folder, to be verified and opened with ``load``.

    Raises:
        CheckpointError: there is no such folder, or it holds no complete checkpoint.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"checkpoint '{path}' {what}; give a checkpoint's folder or a run's output folder")
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    store = CheckpointStore(folder, keep=1)
    best = store.best()
    if best is not None:
        return store.path(best)
    if not store.updates():
        if (path / MANIFEST).is_file():
            return path
        raise CheckpointError(f"'{path}' holds no checkpoint; give a checkpoint's folder or a run's output folder")
    newest = store.newest()
    if newest is None:
        raise CheckpointError(f"no checkpoint in '{folder}' is intact; train again or restore a copy")
    return newest.path
