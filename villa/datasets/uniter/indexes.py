"""Compact indexes of large files, kept in the cache: made at the first start, mapped into memory at the next ones.

They lie in ``$VILLA_CACHE/indexes`` (``~/.cache/villa/indexes``), so that all processes of a machine share one copy.
An index counts as long as the size, the time of the last change and a digest of parts of its file are the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from villa.datasets.own.grid import cache_root
from villa.errors import DataError
from villa.files import atomic_write, locked, new_folder, regular_file

logger = logging.getLogger(__name__)

Arrays = Mapping[str, npt.NDArray[Any]]
Built = Iterator[tuple[str, npt.NDArray[Any]]]

FORMAT = 2
#: Bytes from which on it is worth while to keep an index.
LARGE = 1 << 21
#: Bytes and number of the parts of a file that are compared.
_BLOCK, _BLOCKS = 1 << 16, 16


def stamp(path: Path) -> str:
    """Return what a file's contents are recognised by.

    Raises:
        OSError: it cannot be read.
    """
    stat = path.stat()
    digest = hashlib.blake2b(json.dumps([FORMAT, stat.st_size, stat.st_mtime_ns]).encode(), digest_size=12)
    with path.open("rb") as file:
        for number in range(_BLOCKS + 1):
            file.seek(max(stat.st_size - _BLOCK, 0) * number // _BLOCKS)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def indexed(path: Path, what: str, build: Callable[[], Built], size: int | None = None) -> Arrays:
    """Return the index of a file: of a large one, the index that is kept, if there is one.

    Args:
        path: the file.
        what: what of it is in the index.
        build: makes the index, array by array.
        size: bytes that it is made of; None: all of the file.

    Raises:
        OSError: the file cannot be read.
    """
    found_size = regular_file(path).st_size
    if (found_size if size is None else size) < LARGE:
        return dict(build())
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    name = f"{path.stem}-{what}-{place}"
    try:
        root = cache_root(None) / "indexes"
        folder = root / f"{name}-{stamp(path)}"
        found = _load(folder)
        if found is None:
            root.mkdir(parents=True, exist_ok=True)
            with locked(root / f"{name}.lock"):  # one process makes it, the others wait
                found = _load(folder) or _make(folder, name, build)
        return found
    except OSError as error:
        logger.warning("the index of %s is not kept: %s", path, error.strerror or error)
        return dict(build())


def remembered(files: Sequence[Path], facts: object, compute: Callable[[], str]) -> str:
    """Return a text that depends on files and facts: where the files are large, the one that is kept, if there is one.

    Args:
        files: the files.
        facts: what it depends on besides.
        compute: makes the text.
    """
    try:
        if sum(path.stat().st_size for path in files) < LARGE:
            return compute()
        key = hashlib.sha256(repr([*map(stamp, files), facts]).encode()).hexdigest()[:32]
        file = cache_root(None) / "indexes" / f"{key}.txt"
        if file.exists():
            return file.read_text()
    except OSError as error:
        raise DataError(f"cannot read '{error.filename}' ({error.strerror}); mend the path") from error
    value = compute()
    try:
        atomic_write(file, value)
    except OSError as error:
        logger.warning("'%s' is not kept: %s", file, error.strerror or error)
    return value


def _make(folder: Path, name: str, build: Callable[[], Built]) -> Arrays:
    """Make and keep an index in the place of older ones of the same file."""
    for old in folder.parent.glob(f"{name}-*"):
        shutil.rmtree(old, ignore_errors=True)  # who has it mapped keeps it
    with new_folder(folder) as temporary:
        shapes = {}
        for key, array in build():  # one at a time is in memory
            np.save(temporary / f"{key}.npy", array, allow_pickle=False)
            shapes[key] = [array.dtype.str, *array.shape]
        (temporary / "index.json").write_text(json.dumps(shapes))
    made = _load(folder)
    if made is None:
        raise OSError(f"'{folder}' cannot be read")
    return made


def _load(folder: Path) -> Arrays | None:
    """Map an index into memory, if it is there and whole."""
    try:
        shapes = json.loads((folder / "index.json").read_bytes())
        mapped = {key: np.load(folder / f"{key}.npy", mmap_mode="r", allow_pickle=False) for key in shapes}
    except (OSError, ValueError, EOFError):
        return None
    whole = all([mapped[key].dtype.str, *mapped[key].shape] == shapes[key] for key in shapes)
    return {key: np.asarray(array) for key, array in mapped.items()} if whole else None
