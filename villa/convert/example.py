"""Raw examples, which all readers of annotations yield, and records of JSON files."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from villa.datasets.own.records import JsonLines
from villa.errors import DataError
from villa.files import read_json

_WHAT, _ADVICE = "file", "mend the path or download it again"
_BEGINNING = 1 << 10

#: A text to tokenise: strings are split on white space into words; an integer is the number of a token outside the
#: vocabulary (a person of VCR), with the id ``vocabulary size + number``.
Words = tuple[str | int, ...]


@dataclass(frozen=True)
class RawExample:
    """One example of a raw annotation file.

    Attributes:
        id: key of the example in the database.
        texts: texts to tokenise, by the field that gets the ids: one text, or a list of texts (choices).
        images: name of the feature file, or several; None if the task has no ``txt2img.json``.
        fields: further fields, stored unchanged.
        where: where it was read (``questions.json: record 3``), for messages.
        group: name of its group, for metrics of groups; None without one.
        subsets: names of the subsets of the split that it is in.
    """

    id: str
    texts: Mapping[str, Words | list[Words]]
    images: str | list[str] | None
    fields: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    group: str | None = None
    subsets: tuple[str, ...] = ()

    def membership(self) -> dict[str, Any]:
        """Return ``group`` and ``subsets`` as fields of a record, without empty ones."""
        fields = {"group": self.group, "subsets": list(self.subsets)}
        return {name: value for name, value in fields.items() if value}


@dataclass(frozen=True)
class RawRecord:
    """One JSON object of an annotation file, with checked access to its fields.

    Attributes:
        values: the object.
        where: file and number of the record, for messages.
    """

    values: Mapping[str, Any]
    where: str

    def text(self, *names: str) -> str:
        """Return the first of these fields that is present, which must be text.

        Raises:
            DataError: it is missing or not text.
        """
        name, value = self._find(names)
        if not isinstance(value, str):
            raise DataError(f"{self.where}: '{name}' must be a text, not {value!r:.40}")
        return value

    def integer(self, *names: str) -> int:
        """Return the first of these fields that is present, which must be an integer >= 0.

        Raises:
            DataError: it is missing or not such an integer.
        """
        name, value = self._find(names)
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise DataError(f"{self.where}: '{name}' must be a whole number, not {value!r:.40}")
        return value

    def items(self, name: str, length: int | None = None) -> list[Any]:
        """Return a field that must be a list (of ``length`` items).

        Raises:
            DataError: it is missing, not a list, or has another length.
        """
        value = self._find((name,))[1]
        if not isinstance(value, list) or (length is not None and len(value) != length):
            wanted = "a list" if length is None else f"a list of {length}"
            raise DataError(f"{self.where}: '{name}' must be {wanted}, not {value!r:.40}")
        return value

    def records(self, name: str) -> Iterator[RawRecord]:
        """Yield the objects of a field that must be a list of objects.

        Raises:
            DataError: it is missing or something else.
        """
        for number, value in enumerate(self.items(name), start=1):
            yield as_record(value, f"{self.where}: '{name}' {number}")

    def _find(self, names: tuple[str, ...]) -> tuple[str, Any]:
        for name in names:
            if name in self.values:
                return name, self.values[name]
        present = ", ".join(map(str, self.values))
        raise DataError(f"{self.where}: {_quoted(names)} is missing (present: {present or 'nothing':.200})")


def read_object(path: Path) -> RawRecord:
    """Read a JSON file that holds one object.

    Raises:
        DataError: as for ``villa.files.read_json``, or it holds something else.
    """
    return as_record(read_json(path, _WHAT, _ADVICE), str(path))


def starts_list(path: Path) -> bool:
    """Return whether a JSON file holds a list, by its first character; False if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(_BEGINNING).removeprefix(BOM_UTF8).lstrip()[:1] == b"["
    except OSError:
        return False


def read_records(path: Path, key: str | None = None) -> list[RawRecord]:
    """Read the objects of a list: the whole JSON file, or its entry ``key``.

    Raises:
        DataError: as for ``villa.files.read_json``, or there is no such list.
    """
    value = read_json(path, _WHAT, _ADVICE) if key is None else read_object(path).items(key)
    if not isinstance(value, list):
        raise DataError(f"'{path}' must hold a list of objects, not {_kind(value)}")
    return [as_record(item, f"{path}: record {number}") for number, item in enumerate(value, start=1)]


class LineRecords:
    """The objects of a JSON-lines file, read one at a time.

    Args:
        path: the file.

    Raises:
        DataError: the file is missing or empty.
    """

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[RawRecord]:
        """Yield the records.

        Raises:
            DataError: a line is not a JSON object.
        """
        for number in range(len(self._lines)):
            yield RawRecord(self._lines[number], self._lines.where(number))


def by_number(records: Iterable[RawRecord], field: str) -> dict[int, RawRecord]:
    """Return records by a unique integer field; exact copies of a record are allowed.

    Raises:
        DataError: a record lacks the field, or different records have the same number.
    """
    found: dict[int, RawRecord] = {}
    for record in records:
        first = found.setdefault(record.integer(field), record)
        if first.values != record.values:
            raise repeated(record, first, field)
    return found


def repeated(record: RawRecord, first: RawRecord, field: str) -> DataError:
    """Return the error that two records have the same number."""
    number = record.integer(field)
    return DataError(f"{record.where}: the {field} {number} occurs twice, first in {first.where}; leave one out")


def as_record(value: Any, where: str) -> RawRecord:
    """Wrap a JSON object.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON object is needed, not {_kind(value)}")
    return RawRecord(value, where)


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", type(None): "null"}.get(type(value), f"{value!r:.20}")


def _quoted(names: tuple[str, ...]) -> str:
    return " or ".join(f"'{name}'" for name in names)
