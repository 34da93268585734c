"""The interface of submission formats, the base of formats with one entry per example, and ids of splits."""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat, takewhile
from pathlib import Path
from typing import Any, ClassVar, Generic, NoReturn, TextIO, TypeVar

from villa.errors import DataError, StorageError, one_line
from villa.evaluation.predictions import read_predictions
from villa.files import regular_file, replacing
from villa.json_values import RepeatedNameError, unique_names
from villa.progress import track

T = TypeVar("T", str, list[str])

#: Characters to read at a time; also the longest element of a JSON list.
_PIECE = 1 << 20
_BLANKS = re.compile(r"[ \t\r\n]*")


def text_pieces(path: Path, description: str) -> Iterator[str]:
    """Yield the text of a UTF-8 file a million characters at a time.

    Args:
        path: the file.
        description: what is being done, for the display.

    Raises:
        DataError: the file cannot be read or is not UTF-8.
    """
    return _pieces(path, description, lambda file: file.read(_PIECE))


def line_blocks(path: Path, description: str, encoding: str = "utf-8") -> Iterator[list[str]]:
    """Yield the lines of a UTF-8 file in blocks of about a million characters; see ``text_pieces``.

    Args:
        path: the file.
        description: what is being done, for the display.
        encoding: ``utf-8-sig`` skips a byte-order mark, which submissions must not have.
    """
    return _pieces(path, description, lambda file: file.readlines(_PIECE), encoding)


def _pieces(path: Path, description: str, take: Callable[[TextIO], T], encoding: str = "utf-8") -> Iterator[T]:
    try:
        regular_file(path)
        with path.open(encoding=encoding, newline="") as file:
            total = os.fstat(file.fileno()).st_size // _PIECE + 1
            yield from track(takewhile(bool, map(take, repeat(file))), description, total)
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 text; give the file as it was written") from error
    except (OSError, ValueError) as error:  # ValueError: an impossible path
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot read '{path}' ({reason}); mend the path") from error


def read_objects(path: Path, description: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSON list, each after its place (``file entry 3``) for messages.

    Args:
        path: the file.
        description: what is being done, for the display.

    Raises:
        DataError: the file cannot be read, or is not a JSON list of objects.
    """
    text = _Cursor(path, description)
    if text.peek() != "[":
        raise DataError(f"{path} is not a JSON list; it must begin with '['")
    text.skip()
    number = 0
    while text.peek() != "]" or number:
        number += 1
        where = f"{path} entry {number}"
        if text.peek() != "{":
            raise DataError(f"{where} is not a JSON object; the file must be a list of objects")
        yield where, text.object(where)
        if text.peek() not in (",", "]"):
            raise DataError(f"{where} is not followed by ',' or ']'; is the file complete?")
        if text.peek() == "]":
            break
        text.skip()
    text.skip()
    if text.peek():
        raise DataError(f"{path} goes on after the end of its list; it must hold one JSON list")


class _Cursor:
    """A position in the text of a JSON file, of which only the current piece is in memory."""

    def __init__(self, path: Path, description: str) -> None:
        self._pieces = text_pieces(path, description)
        self._decoder = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=unique_names)
        self._text = ""
        self._at = 0

    def peek(self) -> str:
        """Return the next character that is not blank, or ``""`` at the end."""
        while True:
            blank = _BLANKS.match(self._text, self._at)
            self._at = blank.end() if blank else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def skip(self) -> None:
        """Skip one character."""
        self._at += 1

    def object(self, where: str) -> dict[str, Any]:
        """Return the object that begins here and move to its end.

        Raises:
            DataError: it is not valid JSON, or too long.
        """
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:  # perhaps only because the rest has not been read yet
                final = isinstance(error, RecursionError | RepeatedNameError)
                if final or len(self._text) - self._at > _PIECE or not self._read():
                    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                    raise DataError(f"{where} is not valid JSON ({reason}); is the file complete?") from error
            else:
                return dict(value)

    def _read(self) -> bool:
        piece = next(self._pieces, "")
        self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


#: Files of a text database whose keys are the ids of its examples (the second is VCR's).
DATABASE_FILES = ("id2len.json", "id2len_qa.json")
#: Fields of a record that may hold its id, in order of precedence.
ID_FIELDS = ("id", "question_id", "annot_id", "identifier", "questionId", "sent_id")


class IdCheck:
    """Checks that ids are unique and, if a list is given, exactly those of the list.

    Args:
        wanted: the expected ids; None only checks uniqueness.
    """

    def __init__(self, wanted: Collection[str] | None) -> None:
        self._wanted = None if wanted is None else dict.fromkeys(wanted)
        self._seen: set[str] = set()

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, id_: str, where: str) -> None:
        """Check and record the id at the place ``where``.

        Raises:
            DataError: it occurred before, or is not on the list.
        """
        if id_ in self._seen:
            raise DataError(f"{where} repeats id {id_!r:.60}; keep one entry an id")
        if self._wanted is not None and id_ not in self._wanted:
            count = f"{len(self._wanted):,}"
            raise DataError(
                f"{where} has id {id_!r:.60}, which is not among the {count} expected ids; check both files"
            )
        self._seen.add(id_)

    def finish(self, file: Path) -> None:
        """Check completeness at the end of the file.

        Raises:
            DataError: it has no ids, or ids of the list are missing.
        """
        if not self._seen:
            raise DataError(f"{file} holds no entry; write one for every example")
        missing = [id_ for id_ in self._wanted or () if id_ not in self._seen]
        if missing:
            total = len(self._wanted or ())
            raise DataError(
                f"{file} lacks {len(missing):,} of {total:,} expected ids, first {missing[0]!r:.60}; "
                "write an entry for every example"
            )


def read_ids(path: Path) -> list[str]:
    """Read the ids of a split, without repetitions.

    Args:
        path: a text database's folder (the keys of its ``id2len.json`` or ``id2len_qa.json``); a ``.json`` list of ids
            or records, an object whose keys are ids, or one with a list of records under ``questions``; a ``.jsonl``
            file of records; or, with any other suffix, a text file with one id per line. The id of a record is in
            ``id``, ``question_id``, ``annot_id``, ``identifier``, ``questionId`` or ``sent_id``.

    Raises:
        DataError: the file cannot be read or has no ids.
    """
    if path.is_dir():
        files = [path / name for name in DATABASE_FILES if (path / name).is_file()]
        if not files:
            raise DataError(f"'{path}' is no text database: it holds neither {' nor '.join(DATABASE_FILES)}")
        path = files[0]
    readers = {".json": _from_json, ".jsonl": _from_records}
    ids = list(dict.fromkeys(readers.get(path.suffix, _from_text)(path)))
    if not ids:
        raise DataError(f"'{path}' holds no id; give a text database, a list of ids or a file of records")
    return ids


def _from_text(path: Path) -> Iterator[str]:
    return (line.strip() for line in _lines(path) if line.strip())


def _from_json(path: Path) -> Iterator[str]:
    value = _parse("".join(_lines(path)), str(path))
    if isinstance(value, dict):
        value = value["questions"] if isinstance(value.get("questions"), list) else list(value)
    if not isinstance(value, list):
        raise DataError(f"'{path}' is a JSON {type(value).__name__}; a list or an object is needed")
    return (_id(item, f"{path} element {number}") for number, item in enumerate(value, start=1))


def _from_records(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            where = f"{path} line {number}"
            yield _id(_parse(line, where), where)


def _lines(path: Path) -> Iterable[str]:
    return (line for block in line_blocks(path, "read ids", "utf-8-sig") for line in block)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({one_line(error)}); mend the file") from error


def _id(item: Any, where: str) -> str:
    if isinstance(item, dict):
        item = next((item[field] for field in ID_FIELDS if field in item), None)
    if isinstance(item, bool) or not isinstance(item, str | int) or item == "":
        raise DataError(f"{where} has no id; it must be one, or a record with one in {', '.join(ID_FIELDS)}")
    return str(item)


E = TypeVar("E")


@dataclass(frozen=True)
class Report:
    """The result of validating a valid file.

    Attributes:
        task: name of the format.
        entries: number of examples.
        compared: whether the ids were compared with a list.
        detail: further counts, for the user.
    """

    task: str
    entries: int
    compared: bool
    detail: str = ""

    def __str__(self) -> str:
        notes = [self.detail, "" if self.compared else "ids checked for form and uniqueness only"]
        note = "; ".join(filter(None, notes))
        return f"{self.entries:,} entries, valid {self.task} submission" + (f" ({note})" if note else "")


class Submission(ABC):
    """A format of submission files. ``@register_submission(name)`` registers a subclass.

    Attributes:
        name: the registered name.
        suffix: suffix of the file's name, with the dot.
        description: the file's format in a few words, for messages.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    description: ClassVar[str]

    @abstractmethod
    def write(self, predictions: Path, output: Path) -> int:
        """Convert a prediction file into a submission file, which gets its name when it is complete and valid.

        Args:
            predictions: JSON lines, see ``villa.evaluation.predictions``.
            output: file to write; missing folders are created.

        Returns:
            The number of entries.

        Raises:
            DataError: the predictions do not fit the format, or the file cannot be written.
        """

    @abstractmethod
    def validate(self, file: Path, ids: Collection[str] | None = None) -> Report:
        """Check a submission file of any origin.

        Args:
            file: the file.
            ids: the ids of the split, which the file must have exactly; None only checks form and uniqueness.

        Raises:
            DataError: the first problem, with its place in the file.
        """

    def check_suffix(self, file: Path) -> None:
        """Check the suffix of a file's name.

        Raises:
            DataError: it is wrong.
        """
        if file.suffix != self.suffix:
            raise DataError(f"'{file}' must end in {self.suffix}; a {self.name} submission is a {self.description}")


class EntrySubmission(Submission, Generic[E]):
    """A text file with one entry per example, written and checked as a stream; memory grows with the ids only."""

    @abstractmethod
    def convert(self, record: Mapping[str, Any], where: str) -> E:
        """Convert a prediction into an entry.

        Raises:
            DataError: the prediction at ``where`` lacks a field that the entry needs.
        """

    @abstractmethod
    def check(self, entry: E, where: str) -> str:
        """Check an entry and return its id.

        Raises:
            DataError: the entry at ``where`` does not have the format.
        """

    @abstractmethod
    def read(self, file: Path) -> Iterator[tuple[str, E]]:
        """Yield the entries of a file, each after its place for messages.

        Raises:
            DataError: the file cannot be read or has another format.
        """

    @abstractmethod
    def encode(self, entries: Iterator[E]) -> Iterator[str]:
        """Yield the text of a file with these entries in pieces."""

    def write(self, predictions: Path, output: Path) -> int:
        """Convert, check and write the entries one by one."""
        self.check_suffix(output)
        ids = IdCheck(None)
        try:
            with replacing(output) as temporary:
                with temporary.open("x", encoding="utf-8", newline="") as file:
                    file.writelines(self.encode(self._converted(predictions, ids)))
                ids.finish(predictions)
        except StorageError:
            raise
        except OSError as error:
            raise DataError(f"cannot turn '{predictions}' into '{output}' ({one_line(error)}); check both") from error
        return len(ids)

    def validate(self, file: Path, ids: Collection[str] | None = None) -> Report:
        """Read and check the entries one by one."""
        self.check_suffix(file)
        check = IdCheck(ids)
        for where, entry in self.read(file):
            check.add(self.check(entry, where), where)
        check.finish(file)
        return Report(self.name, len(check), compared=ids is not None)

    def _converted(self, predictions: Path, ids: IdCheck) -> Iterator[E]:
        for number, record in enumerate(track(read_predictions(predictions), "write"), start=1):
            where = f"{predictions} line {number}"
            entry = self.convert(record, where)
            ids.add(self.check(entry, where), where)
            yield entry
