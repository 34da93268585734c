"""An LMDB environment being filled: in large transactions, with a map that grows, and resumable after a kill."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lmdb

from villa.datasets.stores.lmdb_env import DATA_FILE, LOCK_FILE
from villa.errors import DataError
from villa.files import atomic_write, fsync, no_space, open_own
from villa.plugins import one_line

#: What was put so far; a folder with it is unfinished.
JOURNAL = "unfinished.jsonl"
#: Puts, or bytes of values, of a transaction. What is not committed is lost in a kill.
PUTS, BYTES = 1000, 1 << 26
#: Size of the memory map to start with; it doubles when it is full (sparse files of terabytes are not for all disks).
MAP_SIZE = 1 << 26
LONGEST_KEY = 511


class Filling:
    """Puts values into a new environment, or goes on with an unfinished one.

    Beside each value it keeps a record (any JSON value) for files that are written in the end. The journal of records
    is on the disk before the values are, and what it has more than the environment is dropped when it is read again.

    Args:
        folder: folder of the environment; made if missing.
        header: what is being made; an unfinished environment with another header is refused.
        puts: puts a transaction.

    Attributes:
        records: record of every key, in the order of their puts.

    Raises:
        DataError: the folder holds a finished database or one of another header, or another process fills it.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], puts: int = PUTS) -> None:
        self.folder = folder
        self._puts = puts
        self._pending: list[tuple[bytes, bytes]] = []
        self._pending_bytes = 0
        self.records: dict[str, Any] = {}
        self._header = json.dumps(header, sort_keys=True)
        self._journal_file = folder / JOURNAL
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._failed(error) from error
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, _lock(folder))
            self._environment = self._begin()
            stack.callback(self._environment.close)
            self._resume()
            self._open = stack.pop_all()

    def put(self, key: str, value: bytes, record: Any) -> None:
        """Store a value; it is safe from a kill when its transaction is full, or after ``flush``.

        Raises:
            DataError: the key is there already or too long, or the disk is full.
        """
        encoded = key.encode()
        if key in self.records:
            raise DataError(f"'{self.folder}': '{key}' was added already; names must be unique")
        if not 0 < len(encoded) <= LONGEST_KEY:
            raise DataError(f"'{self.folder}': the name '{key:.40}' has {len(encoded)} bytes; 1 to {LONGEST_KEY} fit")
        self.records[key] = record
        self._pending.append((encoded, value))
        self._pending_bytes += len(value)
        if len(self._pending) >= self._puts or self._pending_bytes >= BYTES:
            self.flush()

    def flush(self) -> None:
        """Bring everything put so far to the disk."""
        keys = [key.decode() for key, _ in self._pending]
        try:
            with open_own(self._journal_file, "a") as file:
                file.writelines(_line([key, self.records[key]]) for key in keys)
                file.flush()
                os.fsync(file.fileno())
            self._commit(self._pending)
        except (OSError, lmdb.Error) as error:
            raise self._failed(error) from error
        self._pending, self._pending_bytes = [], 0

    def finish(self, last: Mapping[str, bytes] | None = None) -> None:
        """Close the environment as finished, after putting last values without records."""
        self.flush()
        try:
            self._commit([(key.encode(), value) for key, value in (last or {}).items()])
            self._journal_file.unlink()
            fsync(self.folder)
        except (OSError, lmdb.Error) as error:
            raise self._failed(error) from error
        self._open.close()

    def release(self) -> None:
        """Close the environment as unfinished: it can be gone on with."""
        try:
            self.flush()
        finally:
            self._open.close()

    def _commit(self, values: list[tuple[bytes, bytes]]) -> None:
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    for key, value in values:
                        transaction.put(key, value)
                return
            except lmdb.MapFullError:
                self._environment.set_mapsize(2 * self._environment.info()["map_size"])

    def _begin(self) -> lmdb.Environment:
        if (self.folder / DATA_FILE).exists() and not self._journal_file.exists():
            raise DataError(f"'{self.folder}' holds a finished database; remove it, or give another folder")
        try:
            if not self._journal_file.exists():  # before the environment: without it that would count as finished
                atomic_write(self._journal_file, self._header + "\n")
            for name in (DATA_FILE, LOCK_FILE):  # LMDB would follow a link
                open_own(self.folder / name).close()
            return lmdb.open(str(self.folder), map_size=MAP_SIZE)
        except (OSError, lmdb.Error) as error:
            raise self._failed(error) from error

    def _resume(self) -> None:
        """Read the journal, without a line that a kill cut off, and drop what the environment lacks."""
        try:
            header, *lines = self._journal_file.read_text(encoding="utf-8").split("\n")[:-1] or [""]
            with self._environment.begin() as transaction:
                records = (json.loads(line) for line in lines)
                self.records = {key: record for key, record in records if transaction.get(key.encode()) is not None}
        except (OSError, ValueError, TypeError, lmdb.Error) as error:
            raise self._failed(error) from error
        if header != self._header:
            raise DataError(
                f"'{self.folder}' was begun with other settings ({header:.200}; now {self._header:.200}); "
                "remove it, or go on with the same"
            )
        text = self._header + "\n" + "".join(_line([key, record]) for key, record in self.records.items())
        atomic_write(self._journal_file, text)

    def _failed(self, error: Exception) -> DataError:
        reason = no_space(error) or one_line(error)
        return DataError(f"cannot write the database '{self.folder}' ({reason}); check the disk, and run again")


def _lock(folder: Path) -> int:
    """Lock a folder against other writers for as long as the returned descriptor is open."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DataError(f"'{folder}' is being written by another process; wait for it") from None
    except OSError:  # a file system without locks
        pass
    return descriptor


def _line(value: Any) -> str:
    return json.dumps(value) + "\n"
