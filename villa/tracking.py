"""Trackers record the numbers, figures and predictions of a run (``log.jsonl``, ``timing.jsonl``, TensorBoard, others).

``log.jsonl`` is deterministic: a run that was killed and resumed ends with the same bytes as one that was
not. Times are not deterministic, so records of kind ``timing`` (seconds, examples per second, share of time waiting for
data, ETA) go to ``timing.jsonl`` and TensorBoard only.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from villa.errors import DataError, StorageError, one_line
from villa.files import open_own, room_for
from villa.registry import TRACKERS, register_tracker
from villa.streams import visible

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

#: Kinds of records that depend on the run's configuration, data and seed alone.
RESULT_KINDS = ("train", "val", "test")
TIMING_KIND = "timing"

#: Fields of every record of a JSON-lines log; values must have other names.
_FIELDS = {"update", "kind"}
_COLUMNS = ("update", "kind", "name", "value")
_ROWS_OF_TEXT = 50


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run.

    Attributes:
        folder: its output folder.
        name: its name.
        project: the project that it belongs to, where a tracker has projects.
        recipe: the resolved recipe, as YAML.
        values: its values by dotted key.
    """

    folder: Path
    name: str = "run"
    project: str = "villa"
    recipe: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


class Tracker:
    """Base of trackers, of which a run has one on rank 0; it writes nothing before the first record."""

    @classmethod
    def of(cls, run: TrackedRun) -> Tracker:
        """Return the tracker of a run.

        Raises:
            ConfigError: a package that it needs is not installed.
        """
        return cls()

    def log(self, update: int, kind: str, values: Mapping[str, float]) -> None:
        """Record values by name after ``update`` optimiser steps.

        Args:
            update: optimiser steps completed.
            kind: ``train``, ``val``, ``test`` or ``timing``.
            values: numbers by name.
        """

    def add(self, path: Path) -> None:
        """Record a file that the run has written: a figure (``.png``), or a table of predictions (``.jsonl``)."""

    def state_dict(self) -> dict[str, Any]:
        """Flush all records to disk; return the tracker's position, for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Discard every record after ``state``, where that is possible. Call it before the first ``log``."""

    def close(self) -> None:
        """Write pending records and release the files."""


class Trackers:
    """Several trackers that act as one. One that fails is left out from then on, except those of the run's own files.

    Args:
        trackers: trackers by the name that their state is kept under; may be empty (ranks above 0).
    """

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)
        self._states: dict[str, Any] = {}

    def log(self, update: int, kind: str, values: Mapping[str, float]) -> None:
        """Record values in every tracker."""
        self._each(lambda _, tracker: tracker.log(update, kind, values))

    def add(self, path: Path) -> None:
        """Record a file in every tracker."""
        self._each(lambda _, tracker: tracker.add(path))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every tracker by name; of one that has failed, the last one known."""

        def keep(name: str, tracker: Tracker) -> None:
            self._states[name] = tracker.state_dict()

        self._each(keep)
        return dict(self._states)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the trackers that the state has entries for."""
        self._states = dict(state)

        def load(name: str, tracker: Tracker) -> None:
            if name in state:
                tracker.load_state_dict(state[name])

        self._each(load)

    def close(self) -> None:
        """Close every tracker."""
        self._each(lambda _, tracker: tracker.close())

    def _each(self, call: Callable[[str, Tracker], None]) -> None:
        for name, tracker in [*self._trackers.items()]:
            try:
                call(name, tracker)
            except Exception as error:
                if isinstance(tracker, FileTracker):
                    raise
                del self._trackers[name]
                logger.warning("tracker '%s' has failed and gets nothing more of this run: %s", name, one_line(error))


def run_trackers(run: TrackedRun, names: Iterable[str] = ("tensorboard",)) -> Trackers:
    """Return the trackers of a training run, besides those named ``log.jsonl`` and ``timing.jsonl``.

    Args:
        run: the run.
        names: registered names.

    Raises:
        ConfigError: a package that one needs is not installed.
    """
    own: dict[str, Tracker] = {
        "log": JsonLinesTracker.of(run),
        "timing": JsonLinesTracker(run.folder / "timing.jsonl", kinds=(TIMING_KIND,), append=True),
    }
    return Trackers(own | {name: TRACKERS.get(name).of(run) for name in names if name != "jsonl"})


class FileTracker(Tracker):
    """Base of the trackers that write into the run's folder: a full disk ends the run, which loses nothing."""


@register_tracker("jsonl")
class JsonLinesTracker(FileTracker):
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

    @classmethod
    def of(cls, run: TrackedRun) -> Tracker:
        """Return the log of a run."""
        return cls(run.folder / "log.jsonl")

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
        if not self.path.parent.is_dir() or os.fstat(file.fileno()).st_nlink == 0:
            raise StorageError(
                f"'{self.path}' was removed or moved while the run wrote to it; start again, or put it back and go on "
                "with checkpoint.resume=true"
            )
        with room_for(self.path):
            file.write(self._lines(update, kind, values, first=file.tell() == 0).encode())
            file.flush()

    def _lines(self, update: int, kind: str, values: Mapping[str, float], *, first: bool) -> str:
        """Return the text of a record; ``first`` says that the file is empty."""
        numbers = {name: json_number(value) for name, value in values.items()}
        return json.dumps({"update": update, "kind": kind, **numbers}, allow_nan=False) + "\n"

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


@register_tracker("csv")
class CsvTracker(JsonLinesTracker):
    """A table ``log.csv`` with a line a value: ``update,kind,name,value``."""

    @classmethod
    def of(cls, run: TrackedRun) -> Tracker:
        """Return the table of a run."""
        return cls(run.folder / "log.csv")

    def _lines(self, update: int, kind: str, values: Mapping[str, float], *, first: bool) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([_COLUMNS] * first)
        writer.writerows((update, kind, name, json_number(value)) for name, value in values.items())
        return text.getvalue()


@register_tracker("tensorboard")
class TensorBoardTracker(FileTracker):
    """TensorBoard's event files: scalars tagged ``<kind>/<name>``, the recipe, figures and some predictions.

    Args:
        folder: folder of the event files. Older events in it are hidden from TensorBoard (all of them at a fresh start,
            those after the checkpoint when resuming), so that no point shows twice.
        recipe: the recipe, as YAML.
        values: its values by dotted key.
    """

    def __init__(self, folder: Path, recipe: str = "", values: Mapping[str, Any] | None = None) -> None:
        self.folder, self.recipe, self.values = folder, recipe, values or {}
        self._update = 0
        self._purge = 0
        self._writer: SummaryWriter | None = None
        self._on_exit = ExitStack()

    @classmethod
    def of(cls, run: TrackedRun) -> Tracker:
        """Return the events of a run."""
        return cls(run.folder / "tensorboard", run.recipe, run.values)

    def log(self, update: int, kind: str, values: Mapping[str, float]) -> None:
        """Add one scalar per value."""
        with room_for(self.folder):
            writer, self._update = self._opened(), update
            for name, value in values.items():
                writer.add_scalar(f"{kind}/{name}", value, update)
            if kind == "test":
                self._add_hyperparameters(writer, values)

    def _add_hyperparameters(self, writer: SummaryWriter, scores: Mapping[str, float]) -> None:
        """Add the recipe's values, with the test scores, to the tab that compares runs."""
        from torch.utils.tensorboard.summary import hparams

        named = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in self.values.items() if v is not None}
        reached = {f"test/{name}": value for name, value in scores.items()}
        file_writer = writer._get_file_writer()  # type: ignore[no-untyped-call]
        for summary in hparams(named, reached):  # type: ignore[no-untyped-call]
            file_writer.add_summary(summary)

    def add(self, path: Path) -> None:
        """Add a figure as an image, and the first lines of a table as text."""
        with room_for(self.folder):
            if path.suffix == ".png":
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
                self._opened().add_image(path.stem, pixels, self._update, dataformats="HWC")
            elif path.suffix == ".jsonl":
                columns, rows = table(path, _ROWS_OF_TEXT)
                lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
                text = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
                self._opened().add_text(path.stem, text, self._update)

    def _opened(self) -> SummaryWriter:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._on_exit.enter_context(_errors_unprinted())  # errors may come before the writer is made
            self._writer = SummaryWriter(str(self.folder), purge_step=self._purge)
            if self.recipe and not self._purge:
                self._writer.add_text("recipe", "\n".join(f"    {line}" for line in self.recipe.splitlines()), 0)
        return self._writer

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


def table(path: Path, rows: int) -> tuple[list[str], list[list[Any]]]:
    """Return the columns (but lists of answers) and the first rows of a file of JSON lines."""
    with path.open(encoding="utf-8") as lines:
        records: list[dict[str, Any]] = [json.loads(line) for line in itertools.islice(lines, rows)]
    columns = list(dict.fromkeys(name for record in records for name in record if name != "top"))
    return columns, [[record.get(name) for name in columns] for record in records]


def _cell(value: Any) -> str:
    """Return a value as a cell of a table in Markdown."""
    text = value if isinstance(value, str) else json.dumps(value)
    return visible(text).replace("|", "\\|")


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
