"""Validation of data for ``villa_validate``: every value that a run would read, and checksums if there are any."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from villa.datasets.base import Example
from villa.datasets.cache import INDEX_FILE, damaged_chunks
from villa.datasets.checksums import SUFFIX, verify
from villa.datasets.lxmert.features import TsvFile
from villa.datasets.own.assets import Assets
from villa.datasets.own.files import SUFFIXES, FileStore
from villa.datasets.own.pictures import read_picture
from villa.datasets.own.readers import Reader, Record
from villa.datasets.own.records import guess_regions
from villa.datasets.own.split import JsonlSplit
from villa.datasets.ragged import Integers
from villa.datasets.sources.opening import holds_rows, kind_of, open_source
from villa.datasets.stores import ImageSource
from villa.datasets.text import Texts
from villa.datasets.uniter.box_selection import BoxSelection
from villa.datasets.uniter.image_lmdb import ImageStore
from villa.datasets.uniter.lmdb_env import DATA_FILE
from villa.datasets.uniter.text_lmdb import CHECKSUMS, TextStore
from villa.errors import ConfigError, DataError, about
from villa.progress import track

_CHOICE = re.compile(
    r"feat_(?:th(?P<th>[0-9.e-]+)_max(?P<most>\d+)_min(?P<least>\d+)|numbb(?P<fixed>\d+))(_compressed)?"
)


def validate(path: Path, *, allow_empty_boxes: bool = False) -> str:
    """Check all values of a database, feature file, folder of feature files, or feature cache, or of a source of rows.

    Args:
        path: the file or folder.
        allow_empty_boxes: accept boxes without area.

    Returns:
        A description of the data.

    Raises:
        DataError: naming the first invalid value, or the first file that differs from its checksum.
        ConfigError: the path holds something else.
    """
    if path.is_dir():
        return _folder(path, allow_empty_boxes)
    if path.suffix == ".tsv" and not _is_table(path):
        file = TsvFile(path, allow_empty_boxes=allow_empty_boxes)
        for name in track(list(file), f"read {path.name}"):
            file[name]
        return f"{len(file):,} images, valid region features"
    if kind_of(path) is not None and path.exists():
        return validate_rows(str(path))
    if path.suffix in SUFFIXES:
        return _feature_files([ImageSource(path, "")], allow_empty_boxes)
    if not path.exists():
        raise DataError(f"'{path}' does not exist; mend the path")
    raise ConfigError(f"'{path}' is no data, no features and no trained model; a submission needs --task")


def validate_rows(source: str, columns: Mapping[str, str] | None = None, question: str | None = None) -> str:
    """Check the rows of a user's data, as training would, and read every image or feature file.

    Args:
        source: a file, pattern, folder or address; see ``open_source``.
        columns: name of the column by field.
        question: question of rows without one.

    Returns:
        A description of the data.

    Raises:
        DataError: naming the first row that cannot be used.
    """
    rows = open_source(source, columns, question=question)
    with about(rows.where(0)):
        regions = guess_regions(rows[0])
    vocabulary = Assets(None, [], soft=True, regions=regions, feature_dim=None, extractor=None)
    files = JsonlSplit(rows, vocabulary, _Unread(), train=False).read_index(rows.folder)
    if regions == "files":
        return f"{len(rows):,} rows; {_feature_files(files, allow_empty=False)}"
    for file in track(files, f"reading the images of {Path(rows.name).name}"):
        read_picture(file)
    return (
        f"{len(rows):,} rows with {len(files):,} images, all of which can be read" if files else f"{len(rows):,} rows"
    )


class _Unread(Reader):
    """A reader that reads no text."""

    def open(self, sources: Sequence[ImageSource]) -> None:
        """Return no store."""

    def text_lengths(self, texts: Sequence[Texts], *, images: bool) -> Integers:
        """Return zeros."""
        return np.zeros((len(texts), 2), np.int64)

    def image_length(self, store: Any, image: int) -> int:
        """Return 0."""
        return 0

    def example(self, record: Record, store: Any) -> Example:
        """Refuse."""
        raise NotImplementedError


def _is_table(path: Path) -> bool:
    """Return whether the first line of a TSV file names columns that a record has, which those of LXMERT do not."""
    try:
        with path.open("rb") as file:
            first = file.readline(1 << 16).decode("utf-8-sig")
    except (OSError, ValueError):
        return False
    return not {"question", "text"}.isdisjoint(first.rstrip("\r\n").replace('"', "").split("\t"))


def holds_features(path: Path) -> bool:
    """Return whether a file holds region features; its name may be that of a weights file."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as content:
            return "features" in content.keys()  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError):
        return False


def _folder(path: Path, allow_empty: bool) -> str:
    if (path / INDEX_FILE).is_file():
        damaged, chunks = damaged_chunks(path)
        if damaged:
            raise DataError(f"'{path}': {damaged} of {chunks} parts differ from their checksums; remove the folder")
        return f"feature cache of {chunks} parts, as they were written"
    if (path / DATA_FILE).is_file():
        return _text(path) if (path / "meta.json").exists() else _images(path, allow_empty)
    environments = sorted(file.parent for file in path.glob(f"*/{DATA_FILE}"))
    if environments:
        return "; ".join(f"{folder.name}: {validate(folder, allow_empty_boxes=allow_empty)}" for folder in environments)
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if files:
        return _feature_files([ImageSource(file, "") for file in files], allow_empty)
    if holds_rows(path):
        return validate_rows(str(path))
    raise ConfigError(f"'{path}' holds nothing that can be validated: no database, features, cache or trained model")


def _text(path: Path) -> str:
    files = verify(path / CHECKSUMS)
    database = TextStore(path)
    rows: dict[str, tuple[TextStore, int]] = {}
    for kind in database.kinds():
        store = database.of_kind(kind)
        rows |= {id: (store, row) for row, id in enumerate(store.ids)}
    for store, row in track(list(rows.values()), f"read {path.name}"):
        store.check(row)
    return f"{len(rows):,} examples, valid text database{_checked(files)}"


def _images(path: Path, allow_empty: bool) -> str:
    files = verify(path.parent / f"{path.name}{SUFFIX}")
    database = ImageStore(path.parent, _choice(path.name), allow_empty_boxes=allow_empty)
    for row in track(range(len(database)), f"read {path.name}"):
        database.check([row])
    return f"{len(database):,} images, valid image database{_checked(files)}"


def _choice(folder: str) -> BoxSelection:
    """Return the box selection that an environment's folder is named after."""
    compressed = folder.endswith("_compressed")
    found = _CHOICE.fullmatch(folder)
    if found is None:
        return BoxSelection(compressed=compressed)
    if found["fixed"]:
        return BoxSelection(fixed=int(found["fixed"]), compressed=compressed)
    return BoxSelection(float(found["th"]), int(found["most"]), int(found["least"]), compressed=compressed)


def _checked(files: int) -> str:
    return ", as it was written" if files else " (without checksums: altered values that could be are not seen)"


def _feature_files(files: Sequence[ImageSource], allow_empty: bool) -> str:
    store = FileStore(files, allow_empty_boxes=allow_empty)
    for index in track(range(len(store)), "read features"):
        store.check(index)
    return f"{len(store):,} images, valid region features"
