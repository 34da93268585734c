"""From a folder of ``.npz`` files of region features to an image database."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from villa.datasets.raw.feature_file import Arrays, read_named
from villa.datasets.raw.text_database import Outcome
from villa.datasets.stores.box_selection import BoxSelection
from villa.datasets.stores.image_lmdb import ImageDatabase
from villa.datasets.stores.lmdb_env import DATA_FILE
from villa.datasets.stores.lmdb_filling import JOURNAL, PUTS
from villa.datasets.stores.writers import ImageDatabaseWriter
from villa.engine.progress import Mode, track
from villa.errors import ConfigError, DataError

#: Files handed to a process at a time.
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
    """Write an image database from feature files, or go on with an unfinished one.

    Args:
        source: folder of ``.npz`` files with ``features [R, D]``, ``norm_bb [R, 6]`` and ``conf [R]``, and, for
            MRC, ``soft_labels [R, classes]``; object arrays are never unpickled.
        output: folder of the database's environments (``coco_train2014``).
        boxes: which boxes to keep.
        workers: processes that read files besides the one that writes.
        puts: images that a kill may cost, at most (less where they are large).
        progress: how to show how far it is.
        allow_empty_boxes: accept boxes without area.

    Returns:
        What was done, or None if the database of these files was finished before.

    Raises:
        ConfigError: a negative number of workers.
        DataError: a file cannot be used, or the database there is one of other files.
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
    """Say whether a finished database of these files is there."""
    folder = output / boxes.folder()
    if not (folder / DATA_FILE).exists() or (folder / JOURNAL).exists():
        return False
    present = set(ImageDatabase(output, boxes).names())
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
    """Read files in order, in processes of their own if wanted."""
    read = partial(read_named, source, boxes)
    if not workers:
        yield map(read, names)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield pool.imap(read, names, chunksize=_CHUNK)
