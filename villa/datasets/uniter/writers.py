"""Writers of text and image databases in the format of UNITER and VILLA, which the released code can read.

Both resume after a killed process: ``has`` tells whether an entry is stored. ``close`` finishes a database; leaving a
``with`` block by an exception keeps it unfinished, to be resumed.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import lmdb
import lz4.frame
import msgpack
import numpy as np
import numpy.typing as npt

from villa.datasets.boxes import check_boxes
from villa.datasets.checksums import SUFFIX, write_checksums
from villa.datasets.uniter.box_selection import BoxSelection
from villa.datasets.uniter.image_lmdb import BOX_WIDTH, NAMES_KEY
from villa.datasets.uniter.lmdb_env import DATA_FILE, LOCK_FILE
from villa.datasets.uniter.text_lmdb import CHECKSUMS, check_meta
from villa.errors import DataError, one_line
from villa.facts import CHOICES
from villa.files import atomic_write, fsync, no_space, open_own

#: Journal of the entries so far; its presence marks an unfinished database.
JOURNAL = "unfinished.jsonl"
#: Entries, or bytes, per transaction. Uncommitted entries are lost when the process is killed.
PUTS, BYTES = 1000, 1 << 26
#: Initial size of the memory map; it doubles when full (not all disks support sparse files of terabytes).
MAP_SIZE = 1 << 26
LONGEST_KEY = 511


class Filling:
    """Puts values into a new environment, or resumes an unfinished one.

    With each value it keeps a record (any JSON value) for files that are written at the end. The journal of records is
    flushed to disk before the values; records without a value are dropped on resuming.

    Args:
        folder: folder of the environment, created if missing.
        header: description of the database; an unfinished one with another header is refused.
        puts: entries per transaction.

    Attributes:
        records: record of every key, in insertion order.

    Raises:
        DataError: the folder holds a finished database or one with another header, or another process writes to it.
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
        """Store a value; it is durable once its transaction is full, or after ``flush``.

        Raises:
            DataError: the key exists or is too long, or the disk is full.
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
        """Commit everything put so far to disk."""
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
        """Put the ``last`` values, without records, and close the environment as finished."""
        self.flush()
        try:
            self._commit([(key.encode(), value) for key, value in (last or {}).items()])
            self._journal_file.unlink()
            fsync(self.folder)
        except (OSError, lmdb.Error) as error:
            raise self._failed(error) from error
        self._open.close()

    def release(self) -> None:
        """Close the environment as unfinished, to be resumed."""
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
            if not self._journal_file.exists():  # first: an environment without a journal counts as finished
                atomic_write(self._journal_file, self._header + "\n")
            for name in (DATA_FILE, LOCK_FILE):  # LMDB would follow a link
                open_own(self.folder / name).close()
            return lmdb.open(str(self.folder), map_size=MAP_SIZE)
        except (OSError, lmdb.Error) as error:
            raise self._failed(error) from error

    def _resume(self) -> None:
        """Read the journal, except a truncated last line, and drop records without a value."""
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
    """Lock a folder against other writers while the returned descriptor is open."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DataError(f"'{folder}' is being written by another process; wait for it") from None
    except OSError:  # the file system does not support locks
        pass
    return descriptor


def _line(value: Any) -> str:
    return json.dumps(value) + "\n"


class _Writer:
    """Base of both writers: a database being filled, as a context manager."""

    _filling: Filling

    def has(self, key: str) -> bool:
        """Return whether an entry is stored, so that the caller may skip it."""
        return key in self._filling.records

    def __len__(self) -> int:
        return len(self._filling.records)

    def close(self) -> None:
        """Write the files beside the entries, and finish the database.

        Raises:
            DataError: the disk is full or cannot be written.
        """
        raise NotImplementedError

    def release(self) -> None:
        """Close the database as unfinished, to be resumed."""
        self._filling.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.release()


class TextDatabaseWriter(_Writer):
    """Writes a text database, or resumes an unfinished one.

    Args:
        path: folder of the database (``vqa_train.db``).
        meta: contents of ``meta.json``: at least CLS, SEP, MASK and v_range.
        texts_of_images: also write ``img2txts.json`` (retrieval).
        puts: entries per transaction.

    Raises:
        DataError: ``meta`` is incomplete, or the folder holds a finished or another database.
    """

    def __init__(self, path: Path, meta: Mapping[str, Any], *, texts_of_images: bool = False, puts: int = PUTS) -> None:
        check_meta(meta, "meta")
        self.path = path
        self._meta = dict(meta)
        self._texts_of_images = texts_of_images
        self._filling = Filling(path, {"text database": self._meta}, puts)

    def add(
        self,
        id: str,
        example: Mapping[str, Any],
        length: int | Mapping[str, int],
        images: str | list[str] | None = None,
    ) -> None:
        """Add an example; the data set keeps the order of the calls.

        Args:
            id: id, unique within the database.
            example: fields that the task reads: ``input_ids`` without [CLS] and [SEP], ``img_fname``, ``target``, ...
            length: number of word-pieces, or one per kind (``{"qa": 12, "qar": 20}``, VCR).
            images: image name or names in the image database; None for tasks without ``txt2img.json``.

        Raises:
            DataError: the id exists, or the disk is full.
        """
        value = lz4.frame.compress(msgpack.packb(dict(example), use_bin_type=True))
        self._filling.put(id, value, [dict(length) if isinstance(length, Mapping) else length, images])

    def close(self) -> None:
        """Write ``id2len.json`` (or one per kind), ``txt2img.json`` and so on, and finish the database."""
        lengths: dict[str, dict[str, int]] = {}
        images: dict[str, str | list[str]] = {}
        texts: dict[str, list[str]] = {}
        for id, (length, names) in self._filling.records.items():
            for kind, number in (length if isinstance(length, dict) else {"": length}).items():
                lengths.setdefault(kind, {})[id] = number
            if names is not None:
                images[id] = names
                for name in (names,) if isinstance(names, str) else names:
                    texts.setdefault(name, []).append(id)
        for kind, numbers in (lengths or {"": {}}).items():
            _write_ordered(self.path / (f"id2len_{kind}.json" if kind else "id2len.json"), numbers)
        if images:
            _write_ordered(self.path / "txt2img.json", images)
        if self._texts_of_images:
            _write_ordered(self.path / "img2txts.json", texts)
        _write_ordered(self.path / "meta.json", self._meta)
        self._filling.finish()
        written = [path for path in self.path.iterdir() if path.suffix in (".json", ".mdb") and path.name != "lock.mdb"]
        write_checksums(self.path / CHECKSUMS, written)


class ImageDatabaseWriter(_Writer):
    """Writes the region features of images for one box selection, or resumes an unfinished database.

    Args:
        folder: folder of the environments of all box selections (``coco_train2014``).
        boxes: the box selection.
        puts: images per transaction.
        allow_empty_boxes: accept boxes without area.
        extractor: signature of what makes the features; an unfinished database of another one is refused.

    Raises:
        DataError: the folder holds a finished database for this selection.
    """

    def __init__(
        self,
        folder: Path,
        boxes: BoxSelection,
        *,
        puts: int = PUTS,
        allow_empty_boxes: bool = False,
        extractor: str | None = None,
    ) -> None:
        self.folder = folder
        self._allow_empty = allow_empty_boxes
        self.boxes = boxes
        made = {} if extractor is None else {"extractor": extractor}
        self._filling = Filling(folder / boxes.folder(), {"image database": boxes.folder(), **made}, puts)

    def add(
        self,
        name: str,
        features: npt.ArrayLike,
        norm_bb: npt.ArrayLike,
        conf: npt.ArrayLike,
        soft_labels: npt.ArrayLike | None = None,
    ) -> None:
        """Add an image with its most confident boxes, as many as the selection asks for, by descending confidence.

        Args:
            name: name, unique within the database (``coco_train2014_000000000009.npz``).
            features: region features ``[R, D]``.
            norm_bb: boxes ``[R, 6]``: x1, y1, x2, y2, width, height, normalised by the image size.
            conf: confidences ``[R]``.
            soft_labels: class distributions ``[R, classes]``, column 0 the background.

        Raises:
            DataError: shapes do not match, a box or confidence is invalid, a value is too large for float16, the name
                exists, or the disk is full.
        """
        given = {"features": features, "norm_bb": norm_bb, "conf": conf}
        if soft_labels is not None:
            given["soft_labels"] = soft_labels
        arrays = {key: np.asarray(array) for key, array in given.items()}
        _check(name, arrays)
        try:
            rows = self.boxes.rows(arrays["conf"])
            check_boxes(arrays["norm_bb"][rows].astype(np.float32), allow_empty=self._allow_empty)
        except ValueError as error:
            raise DataError(f"image '{name}': {error}") from error
        with np.errstate(over="ignore"):  # reported below
            kept = {key: np.ascontiguousarray(array[rows], dtype=np.float16) for key, array in arrays.items()}
        wrong = next((key for key, array in kept.items() if not np.isfinite(array).all()), None)
        if wrong is not None:
            raise DataError(f"image '{name}': {wrong} holds NaN, infinite values, or values too large for float16")
        self._filling.put(name, _npz(kept) if self.boxes.compressed else _msgpack(kept), len(kept["conf"]))

    def close(self) -> None:
        """Write the list of names and the numbers of boxes, and finish the database."""
        counts = self.boxes.counts_file()
        if counts is not None:
            _write_ordered(self.folder / counts, self._filling.records)
        self._filling.finish({NAMES_KEY: json.dumps(list(self._filling.records)).encode()})
        folder = self.boxes.folder()
        written = [self.folder / folder / DATA_FILE, *([self.folder / counts] if counts else [])]
        write_checksums(self.folder / f"{folder}{SUFFIX}", written)


def _check(name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Check that the arrays are floats of matching shapes."""
    rows = len(arrays["features"]) if arrays["features"].ndim else 0
    forms = {"features": "[R, D]", "norm_bb": "[R, 6]", "conf": "[R]", "soft_labels": "[R, classes]"}
    for key, array in arrays.items():
        fits = array.ndim == forms[key].count(",") + 1 and len(array) == rows and array.size > 0
        if not fits or (key == "norm_bb" and array.shape[1] != BOX_WIDTH) or array.dtype.kind != "f":
            raise DataError(
                f"image '{name}': {key} is {array.dtype} {list(array.shape)}; it must be floats {forms[key]} "
                f"with the R of the features (here {rows}) and R >= 1"
            )


def _msgpack(arrays: Mapping[str, npt.NDArray[np.float16]]) -> bytes:
    """Pack arrays as msgpack-numpy does."""
    packed = {
        key: {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": array.shape, b"data": array.tobytes()}
        for key, array in arrays.items()
    }
    return bytes(msgpack.packb(packed, use_bin_type=True))


def _npz(arrays: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _write_ordered(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON, preserving the order of keys."""
    atomic_write(path, json.dumps(value, ensure_ascii=False))


def vcr_lengths(ids: Mapping[str, Any]) -> dict[str, int]:
    """Return an example's lengths for ``id2len_qa.json`` and ``id2len_qar.json``, as in the released databases.

    ``qa`` is four times the length of the question with the longest answer; ``qar`` adds the longest rationale once.
    These sizes serve batching and ``max_txt_len`` (220 in the released recipes); they are not numbers of word-pieces.

    Args:
        ids: word-piece ids of ``input_ids``, ``input_ids_as`` and ``input_ids_rs``.
    """
    answer, rationale = (max(map(len, ids[field])) for field in ("input_ids_as", "input_ids_rs"))
    size = CHOICES * (len(ids["input_ids"]) + answer)
    return {"qa": size, "qar": size + rationale}
