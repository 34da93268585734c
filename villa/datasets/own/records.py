"""Records (JSON objects of a user's questions): their fields, and files of lines read by index."""

from __future__ import annotations

import os
import weakref
from array import array
from bisect import bisect_right
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import count, pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from villa.datasets.base import plain_answer
from villa.errors import DataError
from villa.json_values import is_number, is_score, parse_json

#: Maximum length of a line in bytes, so that a file without line ends does not exhaust memory.
LONGEST_LINE = 1 << 26
#: Bytes per read when scanning for lines, and lines that are read together.
_BLOCK, _TOGETHER = 1 << 20, 256
#: Whether a byte is white space for ``bytes.strip``.
_WHITE = np.array([not bytes([code]).strip() for code in range(256)])


class LineFile:
    """The non-blank lines of a file.

    Lines are read on demand by offset, so that a file truncated meanwhile is an error, not a crash. The object can be
    sent to forked and spawned workers.

    Args:
        path: the file; UTF-8, with or without a byte-order mark.

    Raises:
        DataError: the file cannot be read, or a line is too long.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._name = path, str(path)
        self._file: int | None = None
        self._starts, self._end = array("q"), 0
        # For each gap of blank lines: the first record after it, and the number of blank lines so far.
        self._behind, self._blank = array("q", [0]), array("q", [0])
        try:
            if path.exists() and not (
                path.is_file() or path.is_dir()
            ):  # a pipe has no offsets, a device may have no end
                raise DataError(f"'{path}' is no regular file; write the lines to one")
            with path.open("rb", buffering=0) as file:
                self._scan(file)
        except (OSError, ValueError) as error:  # ValueError: no possible path
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"cannot read '{path}' ({reason}); mend the path") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}  # an open file cannot be pickled

    def __len__(self) -> int:
        return len(self._starts)

    def line(self, index: int) -> bytes:
        """Read a line without its line end."""
        start = self._starts[index]
        end = self._starts[index + 1] if index + 1 < len(self) else self._end
        return self._read(index, start, min(end, start + LONGEST_LINE + 1)).partition(b"\n")[0]

    def lines(self) -> Iterator[bytes]:
        """Yield all lines in order without their line ends, reading several at a time."""
        for first in range(0, len(self), _TOGETHER):
            bounds = self._starts[first : first + _TOGETHER + 1]
            if len(bounds) <= _TOGETHER:
                bounds.append(self._end)
            if bounds[-1] - bounds[0] > LONGEST_LINE:
                yield from map(self.line, range(first, first + len(bounds) - 1))
                continue
            data = self._read(first, bounds[0], bounds[-1])
            whole = data.removesuffix(b"\n").split(b"\n")
            if len(whole) == len(bounds) - 1:  # no blank lines among them
                yield from whole
                continue
            for start, end in pairwise(bound - bounds[0] for bound in bounds):
                yield data[start:end].partition(b"\n")[0]

    def number(self, index: int) -> int:
        """Return the line number in the file, from 1, blank lines included."""
        if len(self._behind) == 1:  # the usual case
            return index + 1
        return index + 1 + self._blank[bisect_right(self._behind, index) - 1]

    def where(self, index: int) -> str:
        """Return ``file:line``, for messages."""
        return f"{self._name}:{self.number(index)}"

    def _read(self, index: int, start: int, end: int) -> bytes:
        try:
            if self._file is None:
                self._file = os.open(self.path, os.O_RDONLY)
                weakref.finalize(self, os.close, self._file)
            return os.pread(self._file, end - start, start)
        except OSError as error:
            raise DataError(f"{self.where(index)}: cannot be read ({error.strerror}); mend the path") from error

    def _scan(self, file: BinaryIO) -> None:
        """Scan the file for lines."""
        self._end = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
        file.seek(self._end)
        rest, number = b"", 0
        while block := file.read(max(_BLOCK, len(rest))):
            data = rest + block
            whole = data.rfind(b"\n") + 1
            number += self._add(data[:whole], number)
            rest = data[whole:]
            if len(rest) > LONGEST_LINE:
                raise DataError(
                    f"{self.path}:{number + 1}: the line has more than {LONGEST_LINE:,} bytes; write one object a line"
                )
        self._add(rest, number)

    def _add(self, data: bytes, number: int) -> int:
        """Add the lines of ``data``, which follow ``number`` others; return how many there are."""
        codes = np.frombuffer(data, np.uint8)
        begins = np.append(0, np.flatnonzero(codes == ord("\n")) + 1)
        ends = begins[1:] if data.endswith(b"\n") or not data else np.append(begins[1:], len(data))
        begins = begins[: len(ends)]
        blank = _WHITE[codes[begins]]
        for row in np.flatnonzero(blank).tolist():
            blank[row] = not data[begins[row] : ends[row]].strip()
        kept = np.flatnonzero(~blank)
        records = len(self) + np.arange(len(kept))
        left_out = kept + number - records
        (changes,) = np.nonzero(np.diff(left_out, prepend=self._blank[-1]))
        self._behind.frombytes(records[changes].tobytes())
        self._blank.frombytes(left_out[changes].tobytes())
        self._starts.frombytes((begins[kept] + self._end).tobytes())
        self._end += len(data)
        return len(begins)


#: Source of the regions: the grid of the image, a feature file, whole images, or none (text only).
Regions = Literal["grid", "files", "pixels", "none"]

#: Field of a record that names the file of its regions.
REGION_FIELDS = {"grid": "image", "files": "features", "pixels": "image"}

#: Alternative names of the text field.
TEXT_FIELDS = ("question", "text")

#: Number of human annotators whose agreement makes an answer fully right (the VQA score).
FULL_AGREEMENT = 3


class JsonLines(LineFile):
    """The objects of a JSON-lines file by index; blank lines are skipped.

    Args:
        path: the file; UTF-8, with or without a byte-order mark.

    Raises:
        DataError: the file is missing or empty.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if not len(self):
            raise DataError(f"'{path}' holds no record; write one JSON object a line")

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read an object.

        Raises:
            DataError: the line is not a JSON object; see ``parse_json``.
        """
        return self._parse(index, self.line(index))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._parse, count(), self.lines())

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


def text_field(record: Mapping[str, Any], name: str, where: str) -> str:
    """Return a field that must be a non-empty text.

    Raises:
        DataError: it is missing, empty or not a text.
    """
    value = record.get(name)
    if isinstance(value, str) and value.strip():
        return value
    present = ", ".join(map(str, record)) or "nothing"
    given = f"'{name}' is {value!r:.40}" if name in record else f"'{name}' is missing (present: {present})"
    raise DataError(f"{where}: {given}; it must be a text that is not empty")


def record_id(record: Mapping[str, Any], default: str, where: str) -> str:
    """Return the id of a record, or ``default`` if it has none.

    Raises:
        DataError: it is neither a non-empty text nor a number.
    """
    value = record.get("id", default)
    if (isinstance(value, str) and value) or is_number(value):
        return str(value)
    raise DataError(f"{where}: 'id' is {value!r:.40}; it must be a text or a number, or be left out")


def record_texts(record: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    """Return the text of a record (``question`` or ``text``), and its second text (``text_pair``) or None.

    Raises:
        DataError: one is empty or not a text.
    """
    first, other = TEXT_FIELDS
    name = other if other in record and first not in record else first
    pair = None if record.get("text_pair") is None else text_field(record, "text_pair", where)
    return text_field(record, name, where), pair


def record_files(record: Mapping[str, Any], regions: Regions, where: str) -> list[str]:
    """Return the files that a record names: one, several ``images``, or none for text only.

    Raises:
        DataError: the record does not name them.
    """
    if regions == "none":
        return []
    if regions == "pixels" and "images" in record:
        images = record["images"]
        if not (isinstance(images, list) and images and all(isinstance(i, str) and i.strip() for i in images)):
            raise DataError(f"{where}: 'images' is {images!r:.40}; it must be a list of paths")
        return images
    return [text_field(record, REGION_FIELDS[regions], where)]


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


def answer_scores(record: Mapping[str, Any], where: str, *, written: bool = False) -> dict[str, float] | None:
    """Return the scores in [0, 1] of a record's answers, or None if it has none.

    ``"answer": text`` scores 1, ``"answers": {text: score}`` gives the scores, and in ``"answers": [texts]`` of human
    annotators an answer scores min(count / 3, 1) (the VQA score).

    Args:
        record: the record.
        where: its place, for messages.
        written: keep answers to the letter, as texts to generate; otherwise apply ``plain_answer``.

    Raises:
        DataError: a value of another form.
    """
    plain: Callable[[str], str] = str if written else plain_answer
    if "answers" not in record:
        return None if record.get("answer") is None else {plain(text_field(record, "answer", where)): 1.0}
    answers = record["answers"]
    if isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers):
        return {answer: min(count / FULL_AGREEMENT, 1.0) for answer, count in Counter(map(plain, answers)).items()}
    if isinstance(answers, dict) and answers and all(is_score(score) for score in answers.values()):
        scores: dict[str, float] = {}
        for answer, score in answers.items():
            scores[plain(answer)] = max(float(score), scores.get(plain(answer), 0.0))
        return scores
    raise DataError(f"{where}: 'answers' must be {{answer: score in [0, 1]}} or a list of texts, not {answers!r:.60}")
