"""The journal of a prediction: what is answered so far, kept beside the output until that is complete."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from villa.checkpoints.layout import UNFINISHED_PREDICTIONS
from villa.errors import ConfigError
from villa.files import locked, room_for


class Journal:
    """Answers to batches, a line each, in order.

    A killed process leaves whole lines and at most one that is cut off, which the next process removes.

    Args:
        path: the file.
        file: the same, opened and locked.
        job: what is predicted with what; another job does not go on with the file.

    Attributes:
        path: the file.
        done: number of batches that it holds.

    Raises:
        ConfigError: another job has left it.
    """

    def __init__(self, path: Path, file: IO[bytes], job: Mapping[str, Any]) -> None:
        self.path, self._file, self.done = path, file, 0
        head = json.dumps(job, sort_keys=True).encode() + b"\n"
        first, end = file.readline(), len(head)
        if first.endswith(b"\n") and first != head:
            changed = _difference(first, job)
            raise ConfigError(
                f"'{path}' is what another prediction has left, which differs in {changed}; remove it, or give another "
                "predict.output"
            )
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
        """Append the answers to a batch: any JSON value.

        Raises:
            StorageError: the disk is full.
        """
        with room_for(self.path):
            self._file.write(json.dumps(batch, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
        self.done += 1

    def __iter__(self) -> Iterator[Any]:
        """Yield the answers to all batches."""
        with self.path.open("rb") as lines:
            next(lines)
            yield from map(json.loads, lines)


@contextmanager
def open_journal(output: Path, job: Mapping[str, Any]) -> Iterator[Journal]:
    """Open the journal of a prediction file, or go on with one; it is removed at the end.

    After an error it is kept if it holds an answer.

    Raises:
        ConfigError: another process writes it, or another job has left it.
        OSError: it cannot be written.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(UNFINISHED_PREDICTIONS.replace("*", output.name))
    try:
        with locked(path, wait=False) as file:
            journal = Journal(path, file, job)
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
