"""Trackers record the numbers of a run (``log.jsonl``, ``timing.jsonl``, TensorBoard).

``log.jsonl`` is deterministic: a run that was killed and resumed ends with the same bytes as one that was
not. Times are not deterministic, so records of kind ``timing`` (seconds, examples per second, share of time waiting for
data, ETA) go to ``timing.jsonl`` and TensorBoard only.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from villa.errors import DataError, StorageError
from villa.files import open_own, room_for

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

#: Kinds of records that depend on the run's configuration, data and seed alone.
RESULT_KINDS = ("train", "val", "test")
TIMING_KIND = "timing"

#: Fields of every record of a JSON-lines log; values must have other names.
_FIELDS = {"update", "kind"}


class Tracker(Protocol):
    """The interface that the training loop expects of a tracker."""

    def log(self, update: int, kind: str, values: Mapping[str, float]) -> None:
        """Record values by name after ``update`` optimiser steps.

        Args:
            update: optimiser steps completed.
            kind: ``train``, ``val``, ``test`` or ``timing``.
            values: numbers by name.
        """

    def state_dict(self) -> dict[str, Any]:
        """Flush all records to disk; return the tracker's position, for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Discard every record after ``state``. Call it before the first ``log``."""

    def close(self) -> None:
        """Write pending records and release the files."""


class Trackers:
    """Several trackers that act as one.

    Args:
        trackers: trackers by the name that their state is kept under; may be empty (ranks above 0).
    """

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    def log(self, update: int, kind: str, values: Mapping[str, float]) -> None:
        """Record values in every tracker."""
        for tracker in self._trackers.values():
            tracker.log(update, kind, values)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every tracker by name."""
        return {name: tracker.state_dict() for name, tracker in self._trackers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the trackers that the state has entries for."""
        for name, tracker in self._trackers.items():
            if name in state:
                tracker.load_state_dict(state[name])

    def close(self) -> None:
        """Close every tracker."""
        for tracker in self._trackers.values():
            tracker.close()


def run_trackers(folder: Path, *, tensorboard: bool = True) -> Trackers:
    """Return the trackers of a training run; they write nothing before the first record.

    Args:
        folder: the run's folder, for ``log.jsonl``, ``timing.jsonl`` and ``tensorboard/``.
        tensorboard: whether to write TensorBoard events.
    """
    trackers: dict[str, Tracker] = {
        "log": JsonLinesTracker(folder / "log.jsonl"),
        "timing": JsonLinesTracker(folder / "timing.jsonl", kinds=(TIMING_KIND,), append=True),
    }
    if tensorboard:
        trackers["tensorboard"] = TensorBoardTracker(folder / "tensorboard")
    return Trackers(trackers)


class JsonLinesTracker:
    """A log with one JSON object per line: ``{"update": 10, "kind": "train", "loss": 0.5, ...}``.

    Numbers are written as the shortest text that reads back as the same float, and NaN and infinities, which JSON
    lacks, as the strings ``"nan"``, ``"inf"`` and ``"-inf"``, which ``float()`` reads.

    Args:
        path: the file. The first record overwrites it, unless ``load_state_dict`` was called or ``append`` is set.
        kinds: kinds of records to write; others are skipped.
        append: keep what the file holds and never remove a line (for times, which were really spent).
    """

    def __init__(self, path: Path, *, kinds: Collection[str] = RESULT_KINDS, append: bool = False) -> None:
        self.path = path
        self._kinds = frozenset(kinds)
        self._append = append
        self._file: IO[bytes] | None = None

    def log(self, update: int, kind: str, values: Mapping[str, float]) -> None:
        """Write one line and hand it to the operating system.

        Raises:
            ValueError: a value is called ``update`` or ``kind`` like the record's own fields.
            StorageError: the disk is full, or the file or its folder was removed.
        """
        if kind not in self._kinds:
            return
        if taken := _FIELDS & values.keys():
            raise ValueError(f"a logged value is called {sorted(taken)}, as a field of every record; rename it")
        file = self._file or self._open(self.path.stat().st_size if self._append and self.path.exists() else 0)
        record = {
            "update": update,
            "kind": kind,
            **{name: json_number(value) for name, value in values.items()},
        }
        if not self.path.parent.is_dir() or os.fstat(file.fileno()).st_nlink == 0:
            raise StorageError(
                f"'{self.path}' was removed or moved while the run wrote to it; start again, or put it back and go on "
                "with checkpoint.resume=true"
            )
        with room_for(self.path):
            file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            file.flush()

    def state_dict(self) -> dict[str, Any]:
        """Sync the file to disk; return its length in bytes (nothing in ``append`` mode)."""
        if self._file is not None:
            with room_for(self.path):
                os.fsync(self._file.fileno())
        if self._append:
            return {}
        return {"offset": self._file.tell() if self._file is not None else 0}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Truncate the file to the recorded length; warn if it is missing or shorter, and continue from its end."""
        if self._append:
            return
        offset = int(state["offset"])
        kept = self._open(offset).tell()
        if kept != offset:
            logger.warning(
                "%s: the checkpoint recorded %d bytes, of which %d are left as whole lines; the log goes on from "
                "there with a gap (restore the file and resume again to mend it)",
                self.path,
                offset,
                kept,
            )

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            with room_for(self.path):
                file.close()

    def _open(self, length: int) -> IO[bytes]:
        """Open the file, truncated to the complete lines among its first ``length`` bytes, at its end."""
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_own(self.path, "r+b")
        self._file.truncate(_last_line_end(self._file, length))
        self._file.seek(0, os.SEEK_END)
        return self._file


class TensorBoardTracker:
    """Scalars in TensorBoard's event files, tagged ``<kind>/<name>``.

    Args:
        folder: folder of the event files. Older events in it are hidden from TensorBoard (all of them at a fresh start,
            those after the checkpoint when resuming), so that no point shows twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._update = 0
        self._purge = 0
        self._writer: SummaryWriter | None = None
        self._on_exit = ExitStack()

    def log(self, update: int, kind: str, values: Mapping[str, float]) -> None:
        """Add one scalar per value."""
        with room_for(self.folder):
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._on_exit.enter_context(_errors_unprinted())  # errors may come before the writer is made
                self._writer = SummaryWriter(str(self.folder), purge_step=self._purge)
            self._update = update
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, update)

    def state_dict(self) -> dict[str, Any]:
        """Flush; return the last update that was logged."""
        if self._writer is not None:
            with room_for(self.folder):
                self._writer.flush()
        return {"update": self._update}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hide all later points, which a killed run has left."""
        self.close()
        self._update = int(state["update"])
        self._purge = self._update + 1

    def close(self) -> None:
        """Close the event file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with room_for(self.folder), self._on_exit:
                writer.close()


@contextmanager
def _errors_unprinted() -> Iterator[None]:
    """Silence threads that cannot write their file: whoever waits for them raises the error again."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not isinstance(args.exc_value, OSError):
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def json_number(value: float) -> float | str:
    """Return a value as JSON can hold it: a float, or ``"nan"``, ``"inf"``, ``"-inf"``."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON-lines log, with ``"nan"`` and ``"inf"`` turned back into floats.

    An incomplete last line, as a killed run may leave it, is skipped.

    Raises:
        DataError: the file is missing, or a line is not a record.
    """
    if not path.is_file():
        raise DataError(f"log {path} does not exist; give the log.jsonl of a run")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                values = {k: float(v) for k, v in record.items() if k not in _FIELDS}
                yield {"update": int(record["update"]), "kind": str(record["kind"]), **values}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if not line.endswith("\n"):
                    return
                raise DataError(
                    f"{path} line {number} is not a log record ({line.strip()[:60]!r}); "
                    'each line is {"update": 1, "kind": "train", ...}'
                ) from error


def _last_line_end(file: IO[bytes], limit: int) -> int:
    """Return the position after the last newline among the first ``limit`` bytes, reading backwards in blocks."""
    position = min(limit, file.seek(0, os.SEEK_END))
    while position:
        start = max(0, position - 4096)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0
