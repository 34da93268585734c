"""Read-only LMDB environments, opened on first use and shared by all stores in a process."""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lmdb

from villa.errors import DataError, one_line
from villa.files import regular_file
from villa.mapped_files import Reading, name_damaged_files

DATA_FILE, LOCK_FILE = "data.mdb", "lock.mdb"
#: Largest number of values in a fingerprint.
SAMPLED = 16


class LmdbReader:
    """A read-only LMDB environment (its default database), opened on first use.

    Survives a fork and can be pickled: each process opens the environment anew. All readers of a folder in a process
    share one environment, because LMDB cannot open a file twice. The file must not change meanwhile: no lock is taken.

    Args:
        folder: folder with ``data.mdb``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: _Opened | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def get(self, key: str) -> memoryview | None:
        """Return a value without a copy, or None; the view is valid as long as this reader.

        Raises:
            DataError: the environment cannot be opened.
        """
        opened = self._open()
        try:
            with opened.lock:  # a transaction must not be used by two threads at once
                Reading.path = self.folder
                return opened.transaction.get(key.encode())
        except lmdb.BadValsizeError:  # an empty or over-long key cannot have been stored
            return None
        except lmdb.Error as error:
            raise _damaged(self.folder, error) from error
        finally:
            Reading.path = None

    def __iter__(self) -> Iterator[str]:
        """Yield all keys in byte order."""
        try:
            Reading.path = self.folder
            for key in self._open().transaction.cursor().iternext(keys=True, values=False):
                yield bytes(key).decode()
        except (lmdb.Error, UnicodeDecodeError) as error:
            raise _damaged(self.folder, error) from error
        finally:
            Reading.path = None

    def __len__(self) -> int:
        return int(self._open().environment.stat()["entries"])

    def sample(self, keys: Sequence[str]) -> bytes:
        """Hash a few evenly spaced keys and their values: a cheap fingerprint of the contents."""
        digest = hashlib.blake2b(digest_size=16)
        for key in keys[:: len(keys) // SAMPLED + 1]:
            digest.update(key.encode() + b"\0" + (self.get(key) or b""))
        return digest.digest()

    def _open(self) -> _Opened:
        if self._opened is None or self._opened.closed:
            self._opened = _share(self.folder)
        return self._opened


class _Opened:
    """An open environment with a read transaction, closed with its last reader."""

    def __init__(self, folder: Path) -> None:
        name_damaged_files()
        self.lock = threading.Lock()
        self.closed = False
        try:
            # readahead stays on: a value spans many pages.
            self.environment = lmdb.open(
                str(folder), readonly=True, lock=False, create=False, max_readers=1, subdir=True
            )
        except (lmdb.Error, OSError) as error:
            raise _damaged(folder, error) from error
        try:
            _check_size(self.environment, folder)
            self.transaction = self.environment.begin(buffers=True)
        except (lmdb.Error, DataError):
            self.environment.close()
            raise

    def close(self) -> None:
        self.closed = True
        self.transaction.abort()
        self.environment.close()

    def __del__(self) -> None:
        if not self.closed and hasattr(self, "transaction"):
            self.close()


_table: weakref.WeakValueDictionary[tuple[int, int], _Opened] = weakref.WeakValueDictionary()
_table_lock = threading.Lock()


def _share(folder: Path) -> _Opened:
    """Return this process's environment of a folder, independent of the path by which it is given."""
    try:
        stat = regular_file(folder / DATA_FILE)
    except OSError as error:
        raise DataError(f"'{folder}' is not an LMDB database: it has no {DATA_FILE} ({error.strerror})") from error
    with _table_lock:
        key = (stat.st_dev, stat.st_ino)
        opened = _table.get(key)
        if opened is None:
            opened = _table[key] = _Opened(folder)
        return opened


def _forget() -> None:
    """Close the parent's environments in a forked child (the parent keeps its own), to be opened again."""
    global _table_lock  # noqa: PLW0603 - a thread of the parent may have held it
    _table_lock = threading.Lock()
    for opened in list(_table.values()):
        opened.close()
    _table.clear()


os.register_at_fork(after_in_child=_forget)


def _check_size(environment: lmdb.Environment, folder: Path) -> None:
    """Check for a truncated file: accessing a missing page would kill the process."""
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    present = (folder / DATA_FILE).stat().st_size
    if present < needed:
        raise DataError(
            f"'{folder / DATA_FILE}' is truncated: {present:,} bytes of {needed:,}; copy or download it again"
        )


def _damaged(folder: Path, error: Exception) -> DataError:
    return DataError(f"cannot read the LMDB database '{folder}' ({one_line(error)}); copy or download it again")
