"""The records to predict on (``predict.input``): images of a folder or list, or records in a file."""

from __future__ import annotations

import glob
import hashlib
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from villa.config.schema import RunConfig
from villa.datasets.lines import TextLines
from villa.datasets.own.pictures import SUFFIXES
from villa.datasets.own.records import TEXT_FIELDS, JsonLines, Request, beside, check_ids, record_id
from villa.datasets.sources.hub import HUB, is_saved
from villa.datasets.sources.opening import kind_of, open_source
from villa.datasets.stores import ImageSource
from villa.errors import DataError, about
from villa.extraction.images import images_below, listed_paths, no_image
from villa.files import local_path, plain_path, regular_file

#: Fields that are not read for predictions.
_TARGETS = ("answer", "answers", "group", "subsets")
_JSON_LINES = (".jsonl", ".ndjson")
#: Beginning of a line of JSON.
_OBJECT = b"{"


class ImageRows(Sequence[dict[str, Any]]):
    """Images as records, each called by its path.

    Args:
        name: what messages call them together.
        named: id and file of every image.
    """

    def __init__(self, name: str, named: Sequence[tuple[str, ImageSource]]) -> None:
        self.name, self._named = name, named

    def __len__(self) -> int:
        return len(self._named)

    def __getitem__(self, index: Any) -> Any:
        id_, source = self._named[index]
        return {"id": id_, "image": str(source.path)}

    def where(self, index: int) -> str:
        """Return where an image is named; empty in a folder, for the path says it."""
        return self._named[index][1].named_by

    def number(self, index: int) -> int:
        """Return the number of an image, from 1."""
        return index + 1

    def digest(self) -> str:
        """Return a hash of the names."""
        return hashlib.sha256("\n".join(id_ for id_, _ in self._named).encode()).hexdigest()


class MemoryRows(Sequence[dict[str, Any]]):
    """Records in memory, which messages call by their number if there are several."""

    def __init__(self, records: Sequence[dict[str, Any]]) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        return self._records[index]

    def where(self, index: int) -> str:
        """Return the name of a record, for messages."""
        return f"record {index + 1}" if len(self) > 1 else ""

    def number(self, index: int) -> int:
        """Return the number of a record, from 1."""
        return index + 1

    def digest(self) -> str:
        """Return what tells records in memory from others: nothing."""
        return ""


class Requests(Sequence[Request]):
    """Records to predict on, read by index, each with an ``id`` (the line number by default).

    Args:
        rows: images or records.
        folder: a relative path of an image or feature file is resolved against it if it exists there; otherwise it is
            left for the data set to resolve.
        question: question of records without one.
    """

    def __init__(self, rows: ImageRows | MemoryRows | JsonLines, folder: Path, question: str | None = None) -> None:
        self.rows, self.folder, self.question = rows, folder.absolute(), question

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self._request(index, self.rows[index])

    def __iter__(self) -> Iterator[Request]:
        return (self._request(index, record) for index, record in enumerate(self.rows))

    def digest(self) -> str:
        """Return a hash of the names of the images, or of the file."""
        return self.rows.digest()

    def check(self, each: Callable[[Request], None]) -> None:
        """Check all records before the first prediction.

        Args:
            each: checks one.

        Raises:
            DataError: about the first one that it raises one for, or whose id is unusable or occurs twice.
        """
        hashes = array("q")
        for request in self:
            hashes.append(hash(request["id"]))
            with about(request.where) if request.where else nullcontext():
                each(request)
        check_ids(hashes, lambda: ((request.where, request["id"]) for request in self))

    def _request(self, index: int, record: dict[str, Any]) -> Request:
        where = self.rows.where(index)
        with about(where) if where else nullcontext():
            name = record_id(record, str(self.rows.number(index)))
        asked = {} if self.question is None or record.keys() & {*TEXT_FIELDS} else {TEXT_FIELDS[0]: self.question}
        return Request({**asked, **record, **beside(self.folder, record), "id": name}, where)


@dataclass(frozen=True)
class InputOptions:
    """How ``predict.input`` is read.

    Attributes:
        question: question of records without one.
        columns: column of a table by field.
        images: whether images are read.
        cache_dir: folder of the cache, in which tables are unpacked.
    """

    question: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    images: bool = True
    cache_dir: str | None = None

    @classmethod
    def of(cls, config: RunConfig, default: str | None = None) -> InputOptions:
        """Return the options of a recipe; ``default`` is the question of a model that reads none."""
        predict, dataset = config.predict, config.dataset
        named = getattr(dataset, "columns", {})
        columns = predict.columns or {name: column for name, column in named.items() if name not in _TARGETS}
        question = predict.question or getattr(dataset, "question", None) or default
        return cls(question, columns, cache_dir=getattr(dataset, "cache_dir", None))


def open_requests(place: str, options: InputOptions | None = None) -> Requests:
    """Open what ``predict.input`` names.

    Args:
        place: a folder of images, with all below it; an image; anything that ``open_source`` reads (JSON lines, CSV,
            parquet, a tar, a data set of the hub, ...); or any other file, which lists a path a line.
        options: how it is read.

    Raises:
        DataError: it is missing, or holds no image or record.
    """
    options = options or InputOptions()
    path = None if place.startswith(HUB) else local_path(place)
    if path is None or (not path.exists() and glob.has_magic(place)):
        return _of_source(place, options)
    if path.is_dir():
        if _holds_rows(path, options):
            return _of_source(place, options)
        named = [(_text(file.relative_to(path)), ImageSource(file.absolute(), "")) for file in images_below(path)]
        return Requests(_some(place, named), path, options.question)
    try:
        regular_file(path)
    except OSError as error:
        raise DataError(f"cannot read '{path}' ({error.strerror}); mend the path") from error
    if path.suffix.lower() in SUFFIXES:
        image = ImageRows(place, [(_text(path.name), ImageSource(path.absolute(), ""))])
        return Requests(image, path.parent, options.question)
    if kind_of(path) is not None or _is_json(path):
        return _of_source(place, options)
    return Requests(_some(place, [*_listed(path)]), path.parent, options.question)


def _of_source(place: str, options: InputOptions) -> Requests:
    """Open records; JSON lines are read where they are."""
    question, columns, plain = options.question, options.columns, place.endswith(_JSON_LINES)
    rows = open_source(
        place,
        {} if plain else columns,
        question=None if plain else question,
        images=options.images,
        cache_dir=options.cache_dir,
    )
    return Requests(rows, rows.folder, question)


def _holds_rows(folder: Path, options: InputOptions) -> bool:
    """Return whether a folder holds files of records, or images with captions that are to be read."""
    files = [file for file in folder.iterdir() if file.is_file()]
    rows = [file for file in files if kind_of(file) is not None]
    if is_saved(folder) or any(file.stem == "metadata" for file in rows):
        return True
    if rows and not any(file.suffix.lower() in SUFFIXES for file in files):
        return True
    images = iter(images_below(folder)) if options.question is None else iter(())
    return any(image.with_suffix(".txt").is_file() for image in images)


def _is_json(path: Path) -> bool:
    lines = TextLines(path)
    return len(lines) > 0 and lines.line(0).lstrip().startswith(_OBJECT)


def _listed(path: Path) -> Iterator[tuple[str, ImageSource]]:
    """Yield the images of a list, each called as it is written there."""
    seen: set[str] = set()
    for text, where in listed_paths(path):
        if text in seen:
            raise DataError(f"{where}: '{text}' is listed twice; list every image once")
        seen.add(text)
        with about(where):
            yield text, ImageSource(path.parent.absolute() / plain_path(text), where)


def _text(name: str | Path) -> str:
    """Return a file's name as text that UTF-8 can hold."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _some(place: str, named: Sequence[tuple[str, ImageSource]]) -> ImageRows:
    if not named:
        raise no_image(place)
    return ImageRows(place, named)
