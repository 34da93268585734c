"""From the annotations that data sets are released as to JSON lines with paths of images (``dataset=jsonl``)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from villa.datasets.raw.example import RawExample
from villa.engine.progress import Mode, track
from villa.errors import DataError
from villa.files import replacing
from villa.plugins import one_line


@dataclass(frozen=True)
class Line:
    """What a line will say.

    Attributes:
        fields: of the record, without the images.
        images: where each image may be below a folder of images, the likeliest place first.
        where: where the example was read, for messages.
    """

    fields: dict[str, Any]
    images: Sequence[Sequence[str]]
    where: str

    @classmethod
    def of(cls, example: RawExample, images: Sequence[Sequence[str]], **answer: Any) -> Line:
        """Make a line of an example, with one text, and its answer if there is one."""
        (words,) = example.texts.values()
        return cls({"id": example.id, "question": " ".join(map(str, words)), **answer}, images, example.where)


@dataclass(frozen=True)
class LineSource:
    """An opened file of annotations.

    Attributes:
        lines: what to write.
        total: how many there will be at most; None where that is not known.
        answers: makes the list of answers that are labels; None where nothing answers the questions.
    """

    lines: Iterable[Line]
    total: int | None = None
    answers: Callable[[], Sequence[str]] | None = None


@dataclass
class Counts:
    """Lines that were written, and those left out because an image of theirs is not there."""

    written: int = 0
    left_out: int = 0


def write_lines(
    source: LineSource, output: Path, images: Path | None = None, *, skip_missing: bool = False, progress: Mode = "auto"
) -> Counts:
    """Write a JSON-lines file; it is there whole or not at all.

    Args:
        source: what to write.
        output: the file.
        images: folder of the images. Lines then have paths from the folder of ``output`` to images that are there;
            without it, paths for ``dataset.image_root``, which are not checked.
        skip_missing: leave out lines whose images are not there, instead of stopping at the first one.
        progress: how to show how far it is.

    Raises:
        DataError: an image is missing, two lines have the same id, nothing is left, or the file cannot be written.
    """
    if images is not None and not images.is_dir():
        raise DataError(f"'{images}' is not a folder; give --images the folder with the images")
    finder = _Finder(images, output)
    counts = Counts()
    try:
        with replacing(output) as temporary, temporary.open("x", encoding="utf-8") as file:
            for record, where in _records(source, finder, skip_missing, counts, progress):
                try:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                except UnicodeEncodeError as error:
                    raise DataError(f"{where}: a text holds half a character ({one_line(error)}); mend it") from error
            if not counts.written:
                raise DataError(f"no line is left for '{output}' ({counts.left_out:,} lack their images)")
    except OSError as error:
        raise DataError(f"'{output}' cannot be written: {one_line(error)}") from error
    return counts


def _records(
    source: LineSource, finder: _Finder, skip_missing: bool, counts: Counts, progress: Mode
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield what is to be written, each with its place in what was read."""
    seen: set[str] = set()
    for line in track(source.lines, "writing lines", source.total, mode=progress):
        if line.fields["id"] in seen:
            raise DataError(f"{line.where}: the id '{line.fields['id']}' occurs twice; ids must be unique")
        seen.add(line.fields["id"])
        paths = [finder.find(places, line.where) for places in line.images]
        if None in paths:
            if not skip_missing:
                places = " or ".join(f"'{place}'" for place in line.images[paths.index(None)])
                raise DataError(
                    f"{line.where}: there is no image {places} below '{finder.folder}'; get the images, or leave out "
                    "what lacks them by --skip-missing"
                )
            counts.left_out += 1
            continue
        counts.written += 1
        yield {**line.fields, **({"image": paths[0]} if len(paths) == 1 else {"images": paths})}, line.where


class _Finder:
    """Finds images below a folder.

    Args:
        folder: of the images; None takes the likeliest place unseen.
        output: file whose folder the paths start from.
    """

    def __init__(self, folder: Path | None, output: Path) -> None:
        self.folder = folder
        self._prefix = PurePosixPath()
        if folder is not None:
            self._prefix = PurePosixPath(os.path.relpath(folder.resolve(), output.parent.resolve()))

    def find(self, places: Sequence[str], where: str) -> str | None:
        """Return the path of an image, or None if it is at none of the places.

        Raises:
            DataError: its name leads out of the folder.
        """
        if any(place.startswith("/") or ".." in place.split("/") for place in places):
            raise DataError(f"{where}: '{places[-1]:.80}' is no name of an image; download the file again")
        if self.folder is None:
            return places[0]
        for place in places:
            if (self.folder / place).is_file():
                return str(self._prefix / place)
        return None
