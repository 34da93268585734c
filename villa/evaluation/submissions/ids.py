"""Ids of a split: read from where users have them, and compared with those of a submission."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from villa.errors import DataError
from villa.evaluation.submissions.reading import line_blocks
from villa.json_values import unique_names
from villa.plugins import one_line

#: Files of a text database whose keys are the ids of its examples (VCR has the second).
DATABASE_FILES = ("id2len.json", "id2len_qa.json")
#: Fields of a record that may hold its id, in the order in which they are looked for.
ID_FIELDS = ("id", "question_id", "annot_id", "identifier", "questionId", "sent_id")


class IdCheck:
    """Sees to it that ids are unique and, if a list is given, exactly those of the list.

    Args:
        wanted: the ids that are expected; None compares with nothing.
    """

    def __init__(self, wanted: Collection[str] | None) -> None:
        self._wanted = None if wanted is None else dict.fromkeys(wanted)
        self._seen: set[str] = set()

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, id_: str, where: str) -> None:
        """Take in an id that stands at ``where``.

        Raises:
            DataError: it occurred before, or it is not on the list.
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
        """Say that the file is at its end.

        Raises:
            DataError: it holds nothing, or ids of the list are missing.
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
            file of records; or, with any other ending, a text file with one id a line. The id of a record is in
            ``id``, ``question_id``, ``annot_id``, ``identifier``, ``questionId`` or ``sent_id``.

    Raises:
        DataError: the file cannot be read or holds no ids.
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
