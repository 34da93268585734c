"""Records (JSON objects of a user's questions): their fields, and lines of a file read by number."""

from __future__ import annotations

import json
import mmap
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from villa.datasets.stores.base import Source
from villa.errors import DataError, about
from villa.files import plain_path

#: What a model sees of a record: the grid of its image, a feature file, whole images, or nothing (text only).
Regions = Literal["grid", "files", "pixels", "none"]

#: The field of a record that names what a model sees.
REGION_FIELDS = {"grid": "image", "files": "features", "pixels": "image"}

#: Names of the field with the text of a record.
TEXT_FIELDS = ("question", "text")

#: An answer that this many of the human annotators gave is fully right (the VQA score).
FULL_AGREEMENT = 3


class JsonLines:
    """The objects of a JSON-lines file by number; only offsets are held in memory. Blank lines are skipped.

    Args:
        path: the file.

    Raises:
        DataError: the file is missing or empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        self._starts, self._lines = array("q"), array("q")
        try:
            with path.open("rb") as file:
                start = 0
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        self._starts.append(start)
                        self._lines.append(number)
                    start += len(line)
        except OSError as error:
            raise DataError(f"cannot read '{path}' ({error.strerror}); mend the path") from error
        if not self._starts:
            raise DataError(f"'{path}' holds no record; write one JSON object a line")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}  # a mapping cannot travel to another process

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read an object.

        Raises:
            DataError: the line is not a JSON object.
        """
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = self._starts[index]
        end = self._map.find(b"\n", start)
        try:
            record = json.loads(self._map[start : end if end >= 0 else None])
        except (ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{self.where(index)}: not valid JSON ({reason}); write one object a line") from error
        if not isinstance(record, dict):
            raise DataError(f"{self.where(index)}: a JSON object is needed, not {type(record).__name__}")
        return record

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def number(self, index: int) -> int:
        """Return the line number of a record, from 1."""
        return self._lines[index]

    def where(self, index: int) -> str:
        """Return ``file:line`` of a record, for messages."""
        return f"{self.path}:{self._lines[index]}"


def text_field(record: Mapping[str, Any], name: str, where: str) -> str:
    """Return a field that must be a text with something in it.

    Raises:
        DataError: it is missing, empty or no text.
    """
    value = record.get(name)
    if isinstance(value, str) and value.strip():
        return value
    present = ", ".join(map(str, record)) or "nothing"
    given = f"'{name}' is {value!r:.40}" if name in record else f"'{name}' is missing (present: {present})"
    raise DataError(f"{where}: {given}; it must be a text that is not empty")


def record_texts(record: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    """Return the text of a record (``question`` or ``text``), and its second text (``text_pair``) or None.

    Raises:
        DataError: one is no text, or is empty.
    """
    name = next((name for name in TEXT_FIELDS if name in record), TEXT_FIELDS[0])
    pair = None if record.get("text_pair") is None else text_field(record, "text_pair", where)
    return text_field(record, name, where), pair


def record_sources(record: Mapping[str, Any], regions: Regions, folder: Path, where: str) -> list[Source]:
    """Return the files that a record refers to, relative to ``folder``: one, several ``images``, or none.

    Raises:
        DataError: the record does not name them.
    """
    if regions == "pixels" and "images" in record:
        images = record["images"]
        if not (isinstance(images, list) and images and all(isinstance(i, str) and i.strip() for i in images)):
            raise DataError(f"{where}: 'images' is {images!r:.40}; it must be a list of paths")
        return [_source(image, folder, where) for image in images]
    source = region_source(record, regions, folder, where)
    return [] if source is None else [source]


def region_source(record: Mapping[str, Any], regions: Regions, folder: Path, where: str) -> Source | None:
    """Return the file of a record's regions, relative to ``folder``; None for text only.

    Raises:
        DataError: the record does not name one.
    """
    if regions == "none":
        return None
    return _source(text_field(record, REGION_FIELDS[regions], where), folder, where)


def _source(text: str, folder: Path, where: str) -> Source:
    with about(where):
        return Source(folder / plain_path(text), where)


def beside(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the image or feature file of a record by field, if its relative path leads to one from ``folder``."""
    named = {field: folder / record[field] for field in {*REGION_FIELDS.values()} if isinstance(record.get(field), str)}
    found: dict[str, Any] = {field: str(path) for field, path in named.items() if _exists(path)}
    images = record.get("images")
    if isinstance(images, list) and all(isinstance(image, str) for image in images):
        found["images"] = [str(folder / image) if _exists(folder / image) else image for image in images]
    return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no possible name, for example one that is too long
        return False


def guess_regions(record: Mapping[str, Any]) -> Regions:
    """Say where the regions of records like this one come from, by its fields."""
    if "features" in record:
        return "files"
    if "images" in record:
        return "pixels"
    return "grid" if "image" in record else "none"


def answer_scores(record: Mapping[str, Any], where: str) -> dict[str, float] | None:
    """Return the scores in [0, 1] of a record's answers, or None when it has none.

    ``"answer": text`` scores 1; ``"answers": {text: score}`` is taken as it is; in ``"answers": [texts]`` of human
    annotators an answer scores min(count / 3, 1) (the VQA score).

    Raises:
        DataError: a value of another form.
    """
    if "answers" not in record:
        return None if record.get("answer") is None else {text_field(record, "answer", where): 1.0}
    answers = record["answers"]
    if isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers):
        return {answer: min(count / FULL_AGREEMENT, 1.0) for answer, count in Counter(answers).items()}
    if isinstance(answers, dict) and answers and all(is_score(score) for score in answers.values()):
        return {answer: float(score) for answer, score in answers.items()}
    raise DataError(f"{where}: 'answers' must be {{answer: score in [0, 1]}} or a list of texts, not {answers!r:.60}")


def is_score(value: object) -> bool:
    """Say whether a value of JSON is a number in [0, 1]."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
