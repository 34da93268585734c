"""Validation of data for ``villa_validate``: every value that a run would read, and checksums if there are any."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from villa.datasets.cache import INDEX_FILE, damaged_chunks
from villa.datasets.checksums import SUFFIX, verify
from villa.datasets.lxmert.features import TsvFile
from villa.datasets.own.files import SUFFIXES, FileStore
from villa.datasets.stores import ImageSource
from villa.datasets.uniter.box_selection import BoxSelection
from villa.datasets.uniter.image_lmdb import ImageStore
from villa.datasets.uniter.lmdb_env import DATA_FILE
from villa.datasets.uniter.text_lmdb import CHECKSUMS, TextStore
from villa.errors import ConfigError, DataError
from villa.progress import track

_CHOICE = re.compile(
    r"feat_(?:th(?P<th>[0-9.e-]+)_max(?P<most>\d+)_min(?P<least>\d+)|numbb(?P<fixed>\d+))(_compressed)?"
)


def validate(path: Path, *, allow_empty_boxes: bool = False) -> str:
    """Check all values of a database, feature file, folder of feature files, or feature cache.

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
    if path.suffix == ".tsv":
        file = TsvFile(path, allow_empty_boxes=allow_empty_boxes)
        for name in track(list(file), f"read {path.name}"):
            file[name]
        return f"{len(file):,} images, valid region features"
    if path.suffix in SUFFIXES:
        return _feature_files([path], allow_empty_boxes)
    if not path.exists():
        raise DataError(f"'{path}' does not exist; mend the path")
    raise ConfigError(f"'{path}' is no data, no features and no trained model; a submission needs --task")


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
        return _feature_files(files, allow_empty)
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


def _feature_files(paths: Iterable[Path], allow_empty: bool) -> str:
    store = FileStore([ImageSource(path, "") for path in paths], allow_empty_boxes=allow_empty)
    for index in track(range(len(store)), "read features"):
        store.check(index)
    return f"{len(store):,} images, valid region features"
