"""Records (JSON objects of a user's questions): their fields, and files of them that are read by index."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from villa.datasets.base import plain_answer
from villa.datasets.lines import TextLines
from villa.datasets.stores import Piece
from villa.datasets.text import Texts
from villa.errors import DataError, about
from villa.files import sha256
from villa.json_values import is_number, is_score, parse_json, parse_objects

T = TypeVar("T")

#: Source of the regions: the grid of the image, a feature file, whole images, or none (text only).
Regions = Literal["grid", "files", "pixels", "none"]

#: Field of a record that names the file of its regions.
REGION_FIELDS = {"grid": "image", "files": "features", "pixels": "image"}

#: Alternative names of the text field.
TEXT_FIELDS = ("question", "text")

#: Number of human annotators whose agreement makes an answer fully right (the VQA score).
FULL_AGREEMENT = 3


class JsonLines(TextLines):
    """The objects of a JSON-lines file by index; blank lines are skipped.

    Args:
        path: the file; UTF-8, with or without a byte-order mark.

    Attributes:
        name: what messages call the source of the records.
        folder: folder that relative paths in the records are relative to.

    Raises:
        DataError: the file is missing or empty.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.name, self.folder = str(path), path.parent
        if not len(self):
            raise DataError(f"'{path}' holds no record; write one JSON object a line")

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read an object.

        Raises:
            DataError: the line is not a JSON object; see ``parse_json``.
        """
        return self._parse(index, self.line(index))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return chain.from_iterable(records for _, records in self.blocks())

    def blocks(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Yield all records in order, in lists of some hundred with the index of the first."""
        first = 0
        for lines in self.line_blocks():
            try:
                records = parse_objects([line.decode() for line in lines])
            except UnicodeDecodeError:
                records = None
            if records is not None:
                yield first, records
            else:
                yield from ((index, [self._parse(index, line)]) for index, line in enumerate(lines, first))
            first += len(lines)

    def read(self, what: Callable[[int, list[dict[str, Any]]], T]) -> Iterator[tuple[int, T]]:
        """Yield what a function returns for each of the ``blocks``, with the index of the first record.

        Raises:
            DataError: the function's, about the first record that it raises one for.
        """
        for first, records in self.blocks():
            try:
                found = what(first, records)
            except DataError:
                for index, record in enumerate(records, first):
                    with about(self.where(index)):
                        what(index, [record])
                raise
            yield first, found

    def digest(self) -> str:
        """Return a hash of the contents."""
        return sha256(self.path)

    def _parse(self, index: int, line: bytes) -> dict[str, Any]:
        try:
            record = parse_json(line.decode())
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 text: byte 0x{line[error.start]:02x}"
            raise DataError(f"{self.where(index)}: not valid JSON ({problem}); save the file as UTF-8") from error
        except ValueError as error:
            raise DataError(f"{self.where(index)}: not valid JSON ({error}); write one object a line") from error
        if not isinstance(record, dict):
            raise DataError(f"{self.where(index)}: a JSON object is needed, not {type(record).__name__}")
        return record


class Request(dict[str, Any]):
    """A record to predict on, read from a file.

    Attributes:
        where: its place, ``file:line``, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where


def text_field(record: Mapping[str, Any], name: str) -> str:
    """Return a field that must be a non-empty text.

    Raises:
        DataError: it is missing, empty or not a text.
    """
    value = record.get(name)
    if isinstance(value, str) and value.strip():
        return value
    present = ", ".join(map(str, record)) or "nothing"
    given = f"'{name}' is {value!r:.40}" if name in record else f"'{name}' is missing (present: {present})"
    raise DataError(f"{given}; it must be a text that is not empty")


def record_id(record: Mapping[str, Any], default: str) -> str:
    """Return the id of a record, or ``default`` if it has none.

    Raises:
        DataError: it is neither a non-empty text nor a number.
    """
    value = record.get("id", default)
    if (isinstance(value, str) and value) or is_number(value):
        return str(value)
    raise DataError(f"'id' is {value!r:.40}; it must be a text or a number, or be left out")


def check_ids(hashes: array[int], named: Callable[[], Iterable[tuple[str, str]]]) -> None:
    """Refuse an id that occurs twice, comparing only ids with equal hashes.

    Args:
        hashes: hash of every id; it is sorted in place.
        named: yields the place of every record and its id.

    Raises:
        DataError: naming the second place.
    """
    ordered = np.frombuffer(hashes, np.int64)
    ordered.sort()
    suspects = {*ordered[1:][ordered[1:] == ordered[:-1]].tolist()}
    seen: set[str] = set()
    for where, name in named() if suspects else ():
        if name in seen:
            raise DataError(f"{where}: the id '{name}' occurs twice; give every line its own, or none an id")
        if hash(name) in suspects:
            seen.add(name)


def record_texts(record: Mapping[str, Any]) -> Texts:
    """Return the text of a record (``question`` or ``text``), and its second text (``text_pair``) or None.

    Raises:
        DataError: one is empty or not a text.
    """
    first, other = TEXT_FIELDS
    name = other if other in record and first not in record else first
    pair = None if record.get("text_pair") is None else text_field(record, "text_pair")
    return text_field(record, name), pair


def plain_texts(records: Sequence[Mapping[str, Any]], name: str) -> list[str] | None:
    """Return a field of several records, or None if in some ``text_field`` refuses it."""
    values = [record.get(name) for record in records]
    texts = [value for value in values if type(value) is str and value.strip()]
    return texts if len(texts) == len(values) else None


def texts_of(records: Sequence[Mapping[str, Any]]) -> list[Texts]:
    """Return what ``record_texts`` returns for each of several records, much faster."""
    texts = plain_texts(records, TEXT_FIELDS[0])
    if texts is None or any("text_pair" in record for record in records):
        return list(map(record_texts, records))
    return [(text, None) for text in texts]


def record_files(record: Mapping[str, Any], regions: Regions) -> list[str | Piece]:
    """Return the files that a record names: one, several ``images``, or none for text only; or pieces of files.

    Raises:
        DataError: the record does not name them.
    """
    if regions == "none":
        return []
    if regions == "pixels" and "images" in record:
        images = record["images"]
        if not (isinstance(images, list) and images and all(map(_is_image, images))):
            raise DataError(f"'images' is {images!r:.40}; it must be a list of paths")
        return images
    name = REGION_FIELDS[regions]
    return [record[name]] if isinstance(record.get(name), Piece) else [text_field(record, name)]


def _is_image(value: Any) -> bool:
    return isinstance(value, Piece) or (isinstance(value, str) and bool(value.strip()))


def beside(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the image or feature file of a record by field, if its relative path exists below ``folder``."""
    named = {field: folder / record[field] for field in {*REGION_FIELDS.values()} if isinstance(record.get(field), str)}
    found: dict[str, Any] = {field: str(path) for field, path in named.items() if _exists(path)}
    images = record.get("images")
    if isinstance(images, list) and all(isinstance(image, str) for image in images):
        found["images"] = [str(folder / image) if _exists(folder / image) else image for image in images]
    return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no possible path, such as one that is too long
        return False


def guess_regions(record: Mapping[str, Any]) -> Regions:
    """Return the source of regions for records with the fields of this one."""
    if "features" in record:
        return "files"
    if "images" in record:
        return "pixels"
    return "grid" if "image" in record else "none"


def answer_scores(record: Mapping[str, Any], *, written: bool = False) -> dict[str, float] | None:
    """Return the scores in [0, 1] of a record's answers, or None if it has none.

    ``"answer": text`` scores 1, ``"answers": {text: score}`` gives the scores, and in ``"answers": [texts]`` of human
    annotators an answer scores min(count / 3, 1) (the VQA score).

    Args:
        record: the record.
        written: keep answers to the letter, as texts to generate; otherwise apply ``plain_answer``.

    Raises:
        DataError: a value of another form.
    """
    plain: Callable[[str], str] = str if written else plain_answer
    if "answers" not in record:
        return None if record.get("answer") is None else {plain(text_field(record, "answer")): 1.0}
    answers = record["answers"]
    if isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers):
        return {answer: min(count / FULL_AGREEMENT, 1.0) for answer, count in Counter(map(plain, answers)).items()}
    if isinstance(answers, dict) and answers and all(is_score(score) for score in answers.values()):
        scores: dict[str, float] = {}
        for answer, score in answers.items():
            scores[plain(answer)] = max(float(score), scores.get(plain(answer), 0.0))
        return scores
    raise DataError(f"'answers' must be {{answer: score in [0, 1]}} or a list of texts, not {answers!r:.60}")


def scores_of(records: Sequence[Mapping[str, Any]]) -> list[dict[str, float] | None]:
    """Return what ``answer_scores`` returns for each of several records, much faster."""
    answers = plain_texts(records, "answer")
    if answers is None or any("answers" in record for record in records):
        return list(map(answer_scores, records))
    return [{plain_answer(answer): 1.0} for answer in answers]
