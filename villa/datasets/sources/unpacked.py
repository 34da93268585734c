"""Rows of a source, unpacked once into the cache as JSON lines and images, and read from there by index."""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from villa.datasets.cache_folder import cache_root
from villa.datasets.own.records import JsonLines
from villa.datasets.sources.fields import Columns
from villa.datasets.stores import KEPT_PIECES, Piece
from villa.errors import DataError, about
from villa.files import fsync_tree, is_url, locked, no_space, write_json
from villa.json_values import read_own
from villa.progress import track

FORMAT = 1
ROWS, IMAGES, INDEX, NUMBERS = "rows.jsonl", "images.bin", "index.json", "numbers.npy"
#: Field, beside that of the same name, of images that are pieces of files: ``file:start:size``.
_PIECE = "@"

#: Number of a row, for messages, and its values by field; under ``NAME`` an id for want of another, unique in its part.
Row = tuple[int, dict[str, Any]]
NAME = "__key__"


@dataclass(frozen=True)
class Part:
    """A file, folder or data set whose rows are unpacked.

    Attributes:
        name: what messages call it.
        folder: folder that relative paths in it are relative to.
        stamp: key of its contents: size, time, version.
        read: yields its rows.
        lines: whether rows are numbered by the lines of a file.
        written: whether all values are text; see ``Columns.record``.
        path: the file, of which images may be pieces.
        plain: whether it is one of JSON lines, which can be read as it is.
    """

    name: str
    folder: Path
    stamp: Sequence[Any]
    read: Callable[[Columns], Iterable[Row]]
    lines: bool = False
    written: bool = False
    path: Path | None = None
    plain: bool = False

    def where(self, number: int) -> str:
        """Return the place of a row, for messages."""
        return f"{self.name}:{number}" if self.lines else f"{self.name}: row {number}"


class UnpackedRows(JsonLines):
    """The rows of a source by index.

    An image is a path, or a ``Piece`` of a file. The object can be sent to forked and spawned workers.

    Args:
        cache: folder of the unpacked rows.
        parts: what was unpacked.
        name: what messages call the source.
        folder: folder that relative paths are relative to.
    """

    def __init__(self, cache: Path, parts: Sequence[Part], name: str, folder: Path) -> None:
        super().__init__(cache / ROWS)
        self.name, self.folder = name, folder
        self._digest: str = read_own(cache / INDEX)["digest"]
        self._files = [cache / IMAGES, *(part.path or Path() for part in parts)]
        self._places = [(part.name, part.lines) for part in parts]
        self._rows, self._shifts, self._parts = (array("q", numbers) for numbers in np.load(cache / NUMBERS).tolist())

    def where(self, index: int) -> str:
        """Return the file and the line or row, for messages."""
        place = bisect_right(self._rows, index) - 1
        name, lines = self._places[self._parts[place]]
        number = index + self._shifts[place]
        return f"{name}:{number}" if lines else f"{name}: row {number}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a row."""
        return self._opened(super().__getitem__(index))

    def blocks(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Yield all rows in order, in lists of some hundred with the index of the first."""
        for first, records in super().blocks():
            yield first, [self._opened(record) for record in records]

    def digest(self) -> str:
        """Return a hash of the rows and of the images in them."""
        return self._digest

    def _opened(self, record: dict[str, Any]) -> dict[str, Any]:
        for field in ("image", "images"):
            if (texts := record.pop(_PIECE + field, None)) is not None:
                pieces = [self._piece(text) for text in texts.split()]
                record[field] = pieces if field == "images" else pieces[0]
        return record

    def _piece(self, text: str) -> Piece:
        file, start, size = map(int, text.split(":"))
        return Piece(self._files[file], start, size)


def unpack(
    parts: Sequence[Part],
    columns: Columns,
    name: str,
    *,
    root: Path | None = None,
    cache_dir: str | None = None,
    max_rows: int | None = None,
) -> UnpackedRows:
    """Return the rows of a source, unpacked on first use; other processes wait for the one that does it.

    Args:
        parts: its files.
        columns: columns by field.
        name: what messages call it.
        root: folder that relative paths are relative to; None for the folder of each part.
        cache_dir: folder of the cache; None for the default.
        max_rows: number of rows to unpack; None for all.

    Raises:
        DataError: naming the file and row of the first one that cannot be read; or the cache cannot be written.
    """
    base = root or _common([part.folder for part in parts])
    shared = root is not None or len({part.folder for part in parts}) == 1
    known: list[Any] = [FORMAT, columns.given, columns.question, columns.images, shared, max_rows]
    known += [[part.name, str(part.folder.absolute()), *part.stamp] for part in parts]
    key = hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()
    folder = cache_root(cache_dir) / "rows" / key
    try:
        if not _is_complete(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(folder.with_suffix(".lock")):
                if not _is_complete(folder):
                    _Unpacking(parts, columns, None if shared else base, max_rows).write(folder)
    except OSError as error:
        raise DataError(
            f"the rows of '{name}' cannot be kept in '{folder}': {no_space(error) or error.strerror or error}; make "
            "room, or choose another place by dataset.cache_dir or VILLA_CACHE"
        ) from error
    return UnpackedRows(folder, parts, name, base)


class _Unpacking:
    """Writes the rows of parts, in order, into a folder.

    Args:
        parts: the parts.
        columns: columns by field.
        base: folder that paths are made relative to; None leaves them as they are.
        most: number of rows to write; None for all.
    """

    def __init__(self, parts: Sequence[Part], columns: Columns, base: Path | None, most: int | None) -> None:
        self._most = most
        self._form: bool | None = None
        self._parts, self._columns, self._base = parts, columns, base
        self._digest = hashlib.sha256()
        self._numbers: list[tuple[int, int, int]] = []  # first row, number minus row, part: where one of them changes
        self._recent: dict[bytes, str] = {}
        self._end = 0

    def write(self, folder: Path) -> None:
        """Unpack all, and put the folder in place when it is complete."""
        temporary = folder.with_suffix(".tmp")
        for old in (temporary, folder):
            shutil.rmtree(old, ignore_errors=True)
        temporary.mkdir()
        try:
            with ExitStack() as stack:
                rows, images = (stack.enter_context((temporary / name).open("xb")) for name in (ROWS, IMAGES))
                count = 0
                for number, part in enumerate(self._parts):
                    count = self._unpack(number, part, count, rows, images)
            if not count:
                raise DataError(f"'{self._parts[0].name}' holds no row below its columns; give data with rows")
            np.save(temporary / NUMBERS, np.array(self._numbers, np.int64).reshape(-1, 3).T)
            sizes = [(temporary / name).stat().st_size for name in (ROWS, IMAGES)]
            write_json(temporary / INDEX, {"format": FORMAT, "digest": self._digest.hexdigest(), "sizes": sizes})
            fsync_tree(temporary)
            temporary.replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _unpack(self, which: int, part: Part, count: int, rows: IO[bytes], images: IO[bytes]) -> int:
        shift = None
        left = None if self._most is None else self._most - count
        for number, fields in track(islice(part.read(self._columns), left), f"unpacking {part.name}"):
            if shift != number - count:
                shift = number - count
                self._numbers.append((count, shift, which))
            default = fields.pop(NAME, None)
            with about(part.where(number)):
                record = self._columns.record(fields, written=part.written)
                if default is not None and "id" not in record:
                    record["id"] = default if len(self._parts) == 1 else f"{Path(part.name).name}/{default}"
                self._check_form(record)
                line = self._line(record, which, part, images)
            self._digest.update(line)
            rows.write(line)
            count += 1
        return count

    def _check_form(self, record: dict[str, Any]) -> None:
        """Refuse rows with images after one without: the first tells whether there are any."""
        form = not record.keys().isdisjoint(("image", "images", "features"))
        self._form = form if self._form is None else self._form
        if form != self._form:
            here, first = ("an image", "none") if form else ("no image", "one")
            raise DataError(f"the row has {here}, the first one has {first}; give all rows an image, or none")

    def _line(self, record: dict[str, Any], which: int, part: Part, images: IO[bytes]) -> bytes:
        for field in ("image", "images", "features"):
            value: Any = record.get(field)
            several = value if isinstance(value, list) else [value]
            if any(isinstance(one, bytes | Piece) for one in several):
                if not all(isinstance(one, bytes | Piece) for one in several):
                    raise DataError(f"'{field}' has paths beside the bytes of images; give one or the other")
                del record[field]
                record[_PIECE + field] = " ".join(self._keep(one, which, images) for one in several)
            elif value and self._base is not None:
                moved = [self._moved(part, one) for one in several]
                record[field] = moved if isinstance(value, list) else moved[0]
        try:
            return json.dumps(record, ensure_ascii=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise DataError(f"a value cannot be used ({error}); give texts") from error

    def _keep(self, image: bytes | Piece, which: int, images: IO[bytes]) -> str:
        """Write an image unless it is one of the last ones, or a piece of the part; return where it is."""
        if isinstance(image, Piece):
            return f"{which + 1}:{image.start}:{image.size}"
        key = hashlib.blake2b(image, digest_size=16).digest()
        place = self._recent.get(key)
        if place is None:
            place = self._recent[key] = f"0:{self._end}:{len(image)}"
            self._digest.update(key)
            images.write(image)
            self._end += len(image)
            if len(self._recent) > KEPT_PIECES:
                del self._recent[next(iter(self._recent))]
        return place

    def _moved(self, part: Part, path: Any) -> Any:
        """Return a path relative to the common folder."""
        if not isinstance(path, str) or Path(path).is_absolute() or path.startswith("~") or is_url(path):
            return path
        assert self._base is not None
        return str(part.folder.absolute().relative_to(self._base) / path)


def _common(folders: Sequence[Path]) -> Path:
    """Return the deepest folder that holds all of several, or the only one as it was given."""
    if len({*folders}) == 1:
        return folders[0]
    every = [folder.absolute() for folder in folders]
    return next(place for place in (every[0], *every[0].parents) if all(one.is_relative_to(place) for one in every))


def _is_complete(folder: Path) -> bool:
    try:
        index = read_own(folder / INDEX)
        sizes = [(folder / name).stat().st_size for name in (ROWS, IMAGES)]
        return bool(index["format"] == FORMAT and index["sizes"] == sizes and (folder / NUMBERS).is_file())
    except (OSError, ValueError, KeyError, TypeError):
        return False
