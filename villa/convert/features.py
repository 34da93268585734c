"""Convert a folder of ``.npz`` files of region features to an image database."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt

from villa.convert.text_database import Outcome
from villa.datasets.own.files import NpzFile
from villa.datasets.uniter.box_selection import BoxSelection
from villa.datasets.uniter.image_lmdb import ImageStore
from villa.datasets.uniter.lmdb_env import DATA_FILE
from villa.datasets.uniter.writers import JOURNAL, PUTS, ImageDatabaseWriter
from villa.errors import ConfigError, DataError, reading
from villa.progress import Mode, track

Arrays = dict[str, npt.NDArray[Any]]

_NEEDED = ("features", "norm_bb", "conf")
_OPTIONAL = "soft_labels"


def read_features(path: Path, boxes: BoxSelection) -> Arrays:
    """Read the arrays of the selected boxes from a feature file, by descending confidence.

    Raises:
        DataError: it cannot be read or lacks an array.
    """
    with reading(f"cannot read features from '{path}'", "extract them again"), NpzFile(path) as archive:
        missing = [name for name in _NEEDED if name not in archive]
        if missing:
            raise DataError(f"'{path}' lacks {missing[0]}; a feature file holds {', '.join(_NEEDED)}")
        arrays = {name: archive[name] for name in (*_NEEDED, _OPTIONAL) if name in archive}
    if arrays["conf"].ndim != 1:
        raise DataError(f"'{path}': conf has shape {list(arrays['conf'].shape)}; it must be [R]")
    if len({len(array) if array.ndim else -1 for array in arrays.values()}) == 1:  # else the writer reports it
        try:
            rows = boxes.rows(arrays["conf"])
        except ValueError as error:
            raise DataError(f"'{path}': {error}") from error
        arrays = {name: array[rows] for name, array in arrays.items()}
    return arrays


def read_named(folder: Path, boxes: BoxSelection, name: str) -> tuple[str, Arrays]:
    """Return a file's name and arrays; see ``read_features``."""
    return name, read_features(folder / name, boxes)


#: Files per task of a worker process.
_CHUNK = 4


def make_image_database(
    source: Path,
    output: Path,
    boxes: BoxSelection,
    *,
    workers: int = 0,
    puts: int = PUTS,
    progress: Mode = "auto",
    allow_empty_boxes: bool = False,
) -> Outcome | None:
    """Write an image database from feature files, or continue an unfinished one.

    Args:
        source: folder of ``.npz`` files with ``features [R, D]``, ``norm_bb [R, 6]`` and ``conf [R]``, and, for
            MRC, ``soft_labels [R, classes]``; object arrays are never unpickled.
        output: folder of the database's environments (``coco_train2014``).
        boxes: which boxes to keep.
        workers: processes that read files besides the one that writes.
        puts: most images that are lost when the process is killed (fewer if they are large).
        progress: how to show progress.
        allow_empty_boxes: accept boxes without area.

    Returns:
        What was done, or None if the database of these files was finished before.

    Raises:
        ConfigError: ``workers`` is negative.
        DataError: a file cannot be used, or an existing database is of other files.
    """
    if workers < 0:
        raise ConfigError(f"{workers} workers are too few; give 0 to read in the process that writes, or more")
    names = _names(source)
    if _is_finished(output, boxes, names):
        return None
    with ImageDatabaseWriter(output, boxes, puts=puts, allow_empty_boxes=allow_empty_boxes) as writer:
        present = len(writer)
        todo = [name for name in names if not writer.has(name)]
        if present + len(todo) != len(names):
            raise DataError(
                f"'{output / boxes.folder()}' was begun with other files than those of '{source}'; remove it"
            )
        with _reading(source, todo, boxes, workers) as files:
            for name, arrays in track(files, f"write {output.name}", len(todo), mode=progress):
                _add(writer, source / name, arrays)
    return Outcome(len(names), present)


def _names(source: Path) -> list[str]:
    if not source.is_dir():
        raise DataError(f"'{source}' is not a folder; give one of .npz files")
    names = sorted(path.name for path in source.iterdir() if path.suffix == ".npz")
    if not names:
        raise DataError(f"'{source}' holds no .npz file; give the folder of region features")
    return names


def _is_finished(output: Path, boxes: BoxSelection, names: Sequence[str]) -> bool:
    """Return whether a finished database of these files exists; refuse one of other files."""
    folder = output / boxes.folder()
    if not (folder / DATA_FILE).exists() or (folder / JOURNAL).exists():
        return False
    present = set(ImageStore(output, boxes).names)
    if present != set(names):
        raise DataError(
            f"'{folder}' holds a finished database of {len(present):,} other files than the {len(names):,} given; "
            "give another folder, or remove it"
        )
    return True


def _add(writer: ImageDatabaseWriter, path: Path, arrays: Arrays) -> None:
    try:
        writer.add(path.name, arrays["features"], arrays["norm_bb"], arrays["conf"], arrays.get("soft_labels"))
    except DataError as error:
        raise DataError(f"'{path}': {error}") from error


@contextmanager
def _reading(
    source: Path, names: Sequence[str], boxes: BoxSelection, workers: int
) -> Iterator[Iterator[tuple[str, Arrays]]]:
    """Yield an iterator over the files in order, read by worker processes if there are any."""
    read = partial(read_named, source, boxes)
    if not workers:
        yield map(read, names)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield pool.imap(read, names, chunksize=_CHUNK)
