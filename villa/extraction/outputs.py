"""Where extracted features go: an image database, LXMERT's TSV, or a file for each image. All of them resume."""

from __future__ import annotations

import fcntl
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from villa.datasets.lxmert.features import TsvFile, write_line
from villa.datasets.own.files import SUFFIXES
from villa.datasets.signatures import check_signatures, read_signature, write_signature
from villa.datasets.uniter.box_selection import BoxSelection
from villa.datasets.uniter.image_lmdb import ImageStore
from villa.datasets.uniter.lmdb_env import DATA_FILE
from villa.datasets.uniter.writers import JOURNAL, ImageDatabaseWriter
from villa.errors import ConfigError, DataError, one_line
from villa.extraction.base import Regions
from villa.files import atomic_write, fsync, no_space, open_own

Format = Literal["lmdb", "tsv", "npz", "safetensors"]
#: Images of a database that a killed process may have to do again.
PUTS = 64


class Output(ABC):
    """Features being written, as a context manager: finished on leaving it, or kept to be resumed after an error.

    Args:
        place: the file or folder.
        signature: signature of the extractor.
        facts: what else to note about it.

    Raises:
        DataError: the place holds something else.
    """

    def __init__(self, place: Path, signature: str, facts: Mapping[str, Any]) -> None:
        self.place, self.signature, self._facts = place, signature, facts

    @abstractmethod
    def has(self, name: str) -> bool:
        """Return whether the features of an image are stored."""

    @abstractmethod
    def add(self, name: str, regions: Regions) -> None:
        """Store the features of an image.

        Raises:
            DataError: they cannot be written.
        """

    @abstractmethod
    def finish(self) -> None:
        """Write what belongs beside the features, after the last image."""

    @abstractmethod
    def release(self) -> None:
        """Keep what is stored, to be resumed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.release()

    def _note(self, place: Path) -> None:
        """Note the extractor beside the features, or compare it with the note there."""
        check_signatures([(place, read_signature(place)), ("the extractor of this command", self.signature)])
        write_signature(place, self.signature, self._facts)

    def _note_known(self, place: Path) -> None:
        """Compare the extractor with the note beside features that are there, which must have one."""
        if read_signature(place) is None:
            raise DataError(f"'{place}' has features of an unknown extractor; give another place, or remove it")
        self._note(place)


class DatabaseOutput(Output):
    """An image database of UNITER and VILLA; ``selection`` names its environment."""

    def __init__(self, place: Path, signature: str, facts: Mapping[str, Any], selection: BoxSelection) -> None:
        environment = place / selection.folder()
        super().__init__(environment, signature, facts)
        self._writer: ImageDatabaseWriter | None = None
        self._finished: set[str] = set()
        if (environment / DATA_FILE).exists() and not (environment / JOURNAL).exists():
            self._note_known(environment)
            self._finished = set(ImageStore(place, selection).names)
        else:
            self._writer = ImageDatabaseWriter(place, selection, puts=PUTS, extractor=signature)
            self._note(environment)

    def has(self, name: str) -> bool:
        """Return whether the database has an image."""
        return self._key(name) in self._finished if self._writer is None else self._writer.has(self._key(name))

    def add(self, name: str, regions: Regions) -> None:
        """Add an image."""
        if self._writer is None:
            raise _finished(self.place, name)
        arrays = regions.arrays()
        wanted = ("features", "norm_bb", "conf", "soft_labels")
        self._writer.add(self._key(name), **{key: arrays[key] for key in wanted if key in arrays})

    def finish(self) -> None:
        """Finish the database, unless it was before."""
        if self._writer is not None:
            self._writer.close()

    def release(self) -> None:
        """Keep the unfinished database."""
        if self._writer is not None:
            self._writer.release()

    @staticmethod
    def _key(name: str) -> str:
        return f"{name}.npz"


class TsvOutput(Output):
    """LXMERT's TSV: lines in a file beside it, which gets its name when it is finished."""

    def __init__(self, place: Path, signature: str, facts: Mapping[str, Any]) -> None:
        super().__init__(place, signature, facts)
        self._part, self._journal = (place.with_name(f".{place.name}.{kind}") for kind in ("part", "names"))
        self._names: set[str] = set()
        self._finished = place.exists()
        if self._finished:
            self._note_known(place)
            self._names.update(TsvFile(place))
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        self._lines, self._notes = open_own(self._part, "r+b"), open_own(self._journal, "r+b")
        _lock(self._notes, place)
        self._note(place)
        self._resume()

    def has(self, name: str) -> bool:
        """Return whether an image has a line."""
        return name in self._names

    def add(self, name: str, regions: Regions) -> None:
        """Append the line of an image, and note it once the line is whole."""
        if self._finished:
            raise _finished(self.place, name)
        height, width = regions.size
        boxes = regions.boxes * np.array([width, height] * 2, np.float32)
        named = None
        if regions.attributes is not None and regions.attribute_confidence is not None:
            named = (regions.attributes, regions.attribute_confidence)
        line = write_line(
            name, regions.size, regions.features, boxes, regions.confidence, objects=regions.objects, attributes=named
        )
        try:
            self._lines.write(line)
            self._lines.flush()
            self._notes.write((json.dumps([name, self._lines.tell()]) + "\n").encode())
            self._notes.flush()
        except OSError as error:
            raise _unwritable(self.place, error) from error
        self._names.add(name)

    def finish(self) -> None:
        """Give the file its name."""
        if self._finished:
            return
        self.release()
        fsync(self._part)
        self._part.replace(self.place)
        self._journal.unlink()
        fsync(self.place.parent)

    def release(self) -> None:
        """Close the files."""
        if self._finished:
            return
        self._lines.close()
        self._notes.close()

    def _resume(self) -> None:
        """Read which images have a whole line, and cut off what follows the last one."""
        size, end, noted = os.fstat(self._lines.fileno()).st_size, 0, 0
        for line in self._notes:
            try:
                name, after = json.loads(line)
            except ValueError:
                break
            if after > size or not line.endswith(b"\n"):
                break
            self._names.add(name)
            end, noted = after, noted + len(line)
        for file, length in ((self._lines, end), (self._notes, noted)):
            file.seek(length)
            file.truncate()


class FilesOutput(Output):
    """A file for each image in a folder, ``.npz`` or ``.safetensors``."""

    def __init__(self, place: Path, signature: str, facts: Mapping[str, Any], suffix: str) -> None:
        super().__init__(place, signature, facts)
        self._suffix = suffix
        self._noted = {place}
        place.mkdir(parents=True, exist_ok=True)
        if any(file.suffix in SUFFIXES for file in place.iterdir()):
            self._note_known(place)
        self._note(place)

    def has(self, name: str) -> bool:
        """Return whether an image has a file."""
        return self._file(name).is_file()

    def add(self, name: str, regions: Regions) -> None:
        """Write the file of an image, at once or not at all."""
        arrays, folder = regions.arrays(), self._file(name).parent
        try:
            if folder not in self._noted:
                folder.mkdir(parents=True, exist_ok=True)
                self._note(folder)
                self._noted.add(folder)
            atomic_write(self._file(name), _npz(arrays) if self._suffix == ".npz" else self._safetensors(arrays))
        except OSError as error:
            raise _unwritable(self._file(name), error) from error

    def finish(self) -> None:
        """Do nothing: every file is whole."""

    def release(self) -> None:
        """Do nothing: every file is whole."""

    def _file(self, name: str) -> Path:
        return self.place / f"{name}{self._suffix}"

    def _safetensors(self, arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
        from safetensors.numpy import save

        plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        return bytes(save(plain, {"extractor": self.signature}))


def open_output(
    place: Path,
    form: Format,
    selection: BoxSelection,
    signature: str,
    facts: Mapping[str, Any],
    *,
    compressed: bool = False,
) -> Output:
    """Begin to write features, or go on.

    Args:
        place: the file (TSV) or folder.
        form: the format.
        selection: which boxes an image has.
        signature: signature of the extractor.
        facts: what else to note about it.
        compressed: compress the values of a database.

    Raises:
        ConfigError: the options do not go together.
        DataError: the place holds something else, or cannot be written.
    """
    if compressed and form != "lmdb":
        raise ConfigError(f"compressed databases are lmdb, not {form}; leave out one of both")
    if form == "tsv" and place.suffix != ".tsv":
        raise ConfigError(f"the file of format tsv must be called .tsv, not '{place.name}'; add the suffix")
    try:
        if form == "lmdb":
            return DatabaseOutput(place, signature, facts, replace(selection, compressed=compressed))
        if form == "tsv":
            return TsvOutput(place, signature, facts)
        return FilesOutput(place, signature, facts, f".{form}")
    except OSError as error:
        raise _unwritable(place, error) from error


def checked(regions: Regions, form: Format) -> Regions:
    """Return regions that every reader accepts: finite, and without empty boxes, which get one pixel.

    Raises:
        ValueError: a value is not finite, or too large for the float16 of a database.
    """
    largest = np.finfo(np.float16 if form == "lmdb" else np.float32).max
    if not np.isfinite(regions.features).all() or np.abs(regions.features).max(initial=0) > largest:
        raise ValueError(f"its features are not finite, or larger than {largest:g}; use another detector or format")
    if not len(regions.features):
        raise ValueError("nothing is found in it; lower the threshold, or raise the least number of boxes")
    pixel = 1 / np.array([regions.size[1], regions.size[0]], np.float32)
    low, high = regions.boxes[:, :2], regions.boxes[:, 2:]
    empty = high - low <= 0
    low = np.where(empty, np.clip(low, 0, 1 - pixel), low)
    boxes = np.concatenate([low, np.where(empty, low + pixel, high)], axis=1).astype(np.float32)
    return replace(regions, boxes=boxes)


def _npz(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _lock(file: IO[bytes], place: Path) -> None:
    """Lock a file that is being written, as long as it is open."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"'{place}' is being written by another process; wait for it") from None
    except OSError:  # the file system has no locks
        pass


def _finished(place: Path, name: str) -> DataError:
    return DataError(f"'{place}' is finished, without '{name}'; give another place for these images, or remove it")


def _unwritable(place: Path, error: OSError) -> DataError:
    reason = no_space(error) or one_line(error)
    return DataError(f"cannot write '{place}' ({reason}); check the disk and the path, and run again")
