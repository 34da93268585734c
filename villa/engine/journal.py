"""The journal of a prediction or probe: what is done so far, kept beside the output until that is complete."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from villa.checkpoints.layout import UNFINISHED_OUTPUTS
from villa.config.printer import leaves
from villa.config.schema import RunConfig
from villa.errors import ConfigError
from villa.files import locked, room_for
from villa.hub.source import Source

#: Prefixes of the options on which what a model finds depends.
_SECTIONS = ("dataset.", "model.", "user_dir", "training.precision", "checkpoint.weights")


class Journal:
    """What was found for batches, a line each, in order.

    A killed process leaves whole lines and at most one that is cut off, which the next process removes.

    Args:
        path: the file.
        file: the same, opened and locked.
        job: what is computed with what; another job does not go on with the file.
        anew: whether another job takes its place, instead of being refused.

    Attributes:
        path: the file.
        done: number of batches that it holds.
        note: what the user should know: that another job's were dropped; None if there were none.

    Raises:
        ConfigError: another job has left it.
    """

    def __init__(self, path: Path, file: IO[bytes], job: Mapping[str, Any], *, anew: bool = False) -> None:
        self.path, self._file, self.done = path, file, 0
        self.note: str | None = None
        head = json.dumps(job, sort_keys=True).encode() + b"\n"
        first, end = file.readline(), len(head)
        if first.endswith(b"\n") and first != head:
            changed = _difference(first, job)
            if not anew:
                raise ConfigError(
                    f"'{path}' is what another prediction has left, which differs in {changed}; remove it, or give "
                    "another predict.output"
                )
            self.note = f"begun anew: what an interrupted run has left here differs in {changed}"
        if first == head:
            while (line := file.readline()).endswith(b"\n"):
                self.done, end = self.done + 1, end + len(line)
        else:
            file.seek(0)
            file.write(head)
        file.seek(end)
        file.truncate()
        file.flush()

    def add(self, batch: Any) -> None:
        """Append what was found for a batch: any JSON value.

        Raises:
            StorageError: the disk is full.
        """
        with room_for(self.path):
            self._file.write(json.dumps(batch, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
        self.done += 1

    def __iter__(self) -> Iterator[Any]:
        """Yield what was found for all batches."""
        with self.path.open("rb") as lines:
            next(lines)
            yield from map(json.loads, lines)


def journal_of(output: Path) -> Path:
    """Return the place of an output file's journal."""
    return output.with_name(UNFINISHED_OUTPUTS.replace("*", output.name))


def facts_of_model(config: RunConfig, source: Source, *more: str) -> dict[str, Any]:
    """Return what a job depends on: the weights, and options of the recipe.

    Args:
        config: the recipe.
        source: where the weights are from.
        more: prefixes of the options that matter besides those of the data and the model.
    """
    files = [(file.name, file.stat()) for file in sorted(source.path.glob("*.safetensors"))]
    weights = [[name, found.st_size, found.st_mtime_ns] for name, found in files]
    options = {key: value for key, value in leaves(config).items() if key.startswith((*_SECTIONS, *more))}
    recipe = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()
    return {"checkpoint.path": [str(source.path.resolve()), source.update, *weights], "the recipe": recipe}


@contextmanager
def open_journal(output: Path, job: Mapping[str, Any], *, anew: bool = False) -> Iterator[Journal]:
    """Open the journal of an output file, or go on with one; it is removed at the end.

    After an error it is kept if it holds a batch.

    Raises:
        ConfigError: another process writes it, or another job has left it.
        OSError: it cannot be written.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    path = journal_of(output)
    try:
        with locked(path, wait=False) as file:
            journal = Journal(path, file, job, anew=anew)
            try:
                yield journal
            except BaseException:
                if not journal.done:
                    path.unlink()
                raise
            path.unlink()
    except BlockingIOError:
        raise ConfigError(f"'{output}' is being written by another process; wait for it") from None


def _difference(line: bytes, job: Mapping[str, Any]) -> str:
    """Name what differs between two jobs."""
    try:
        before = json.loads(line)
    except ValueError:
        return "its form"
    return ", ".join(sorted(name for name in job if not isinstance(before, dict) or before.get(name) != job[name]))
