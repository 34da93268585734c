"""The cache folder: what villa keeps there, which is made again when it is needed. Nothing here imports torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from villa.errors import StorageError
from villa.files import locked, plain_path

#: What villa keeps, by the name of its folder.
KINDS = {
    "grid": "features of images",
    "indexes": "indexes of databases and tables",
    "rows": "rows of tables, archives and folders",
    "synthetic": "generated data sets",
    "tsv": "indexes of feature files",
}
_LOCK = ".lock"


def cache_root(folder: str | None = None) -> Path:
    """Return the root of all caches: ``folder``, ``$VILLA_CACHE``, or ``~/.cache/villa``."""
    return plain_path(folder or os.environ.get("VILLA_CACHE") or "~/.cache/villa")


@dataclass(frozen=True)
class Entry:
    """Something in the cache.

    Attributes:
        kind: a key of ``KINDS``.
        path: its file or folder.
        size: bytes on the disk.
        changed: seconds since the epoch when it was last written.
    """

    kind: str
    path: Path
    size: int
    changed: float


def entries(root: Path) -> Iterator[Entry]:
    """Yield what villa has put into a cache folder; links, and what others have put there, are left alone."""
    for kind in KINDS:
        with suppress(FileNotFoundError, NotADirectoryError):
            for path in sorted((root / kind).iterdir()):
                if path.suffix != _LOCK and not path.is_symlink() and not (root / kind).is_symlink():
                    with suppress(FileNotFoundError):  # another process is at work
                        yield Entry(kind, path, _size(path), path.stat().st_mtime)


def remove(entry: Entry) -> bool:
    """Remove an entry; return False if another process is making it.

    Raises:
        StorageError: it cannot be removed.
    """
    path = entry.path
    name = path.stem.rpartition("-")[0] if entry.kind == "indexes" else path.stem  # <name>-<stamp>.arrow
    lock = path.with_name(name + _LOCK)
    try:
        with locked(lock, wait=False):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StorageError(f"'{path}' cannot be removed: {error.strerror or error}") from error
    return True


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.lstat().st_size
    return sum((Path(folder) / name).lstat().st_size for folder, _, names in os.walk(path) for name in names)
