"""Samples of tar archives in the order of WebDataset: neighbouring files whose names differ after the first dot."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from villa.datasets.own.pictures import LARGEST, SUFFIXES
from villa.datasets.sources.fields import BASE64, Columns
from villa.datasets.sources.unpacked import NAME, Row
from villa.datasets.stores import Piece
from villa.errors import DataError, about, reading
from villa.json_values import parse_json

_BLOCK = 512
#: Longest text in an archive, and longest header that extends another, in bytes.
_LONGEST, _LONGEST_HEADER = 1 << 26, 1 << 20
#: Types of regular files, and of headers that give the next file a longer name, or other values.
_FILES, _LONG_NAME, _VALUES, _SPARSE = b"0\x007", b"L", b"x", b"S"
_VALUE = re.compile(rb"(\d+) ([^=]+)=")
#: Names, after the dot, of texts and of classes.
_TEXTS, _CLASS, _JSON = ("txt", "text", "caption"), "cls", "json"


@dataclass(frozen=True)
class Member:
    """A regular file in an archive.

    Attributes:
        name: its name, which nothing on the disk is called by.
        start: offset of its contents.
        size: number of bytes, which the archive has.
    """

    name: str
    start: int
    size: int


def members(file: BinaryIO, end: int | None) -> Iterator[Member]:
    """Yield the regular files of a tar; what the caller does not read of one is passed over.

    Args:
        file: the archive.
        end: its size; None if it cannot be known, for a compressed one.

    Raises:
        ValueError: it is damaged, or cut off.
    """
    position, values = 0, dict[bytes, bytes]()  # values: what headers say of the file after them
    while header := _header(file, position):
        start, kind = position + _BLOCK, header[156:157]
        size = _size(header, position)
        if kind in (_LONG_NAME, _VALUES):
            data = _extension(file, size, position)
            values |= {b"path": data.rstrip(b"\0")} if kind == _LONG_NAME else _values(data)
        else:
            size = _whole(values.get(b"size"), size)
            if end is not None and start + size > end:
                raise ValueError(f"the file at byte {position:,} claims {size:,} bytes, but the archive ends before")
            if kind in _FILES:
                yield Member(values.get(b"path", _name(header)).decode(), start, size)
            values = {}
        position = start + -(-size // _BLOCK) * _BLOCK
    while rest := file.read(1 << 16):
        if any(rest):
            raise ValueError("it goes on after its end; join archives by listing them")


def read_tar(path: Path, columns: Columns) -> Iterator[Row]:
    """Yield the samples of an archive, plain or compressed (``.gz``), with their numbers, from 1.

    The columns of a sample are the texts of its files by what follows the first dot of their names, the values of its
    ``json``, and by default ``image``, ``text`` (of ``txt``) and ``answer`` (of ``cls``); the ids are the names.

    Raises:
        DataError: the archive is damaged, or a sample cannot be used.
    """
    packed = path.suffix in (".gz", ".tgz")
    with (
        reading(f"'{path}' cannot be read", "copy it again, or write it again"),
        cast(BinaryIO, gzip.open(path) if packed else path.open("rb")) as file,
    ):
        number, sample = 0, _Sample("")
        for member in members(file, None if packed else path.stat().st_size):
            name = PurePosixPath(member.name)
            stem, _, ending = name.name.partition(".")
            if not stem or not ending:
                continue
            key = str(name.with_name(stem))
            if key != sample.key:
                if sample.values:
                    number += 1
                    yield number, sample.fields(path, columns)
                sample = _Sample(key)
            with about(f"{path}: '{member.name}'"):
                sample.add(ending.lower(), member, file, None if packed else path, columns)
        if sample.values:
            yield number + 1, sample.fields(path, columns)


class _Sample:
    """The files of one sample.

    Args:
        key: their name up to the first dot.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.values: dict[str, Any] = {}
        self._noted: dict[str, Any] = {}

    def add(self, ending: str, member: Member, file: BinaryIO, path: Path | None, columns: Columns) -> None:
        """Read a file, or note where it is."""
        if ending in self.values:
            raise DataError("the sample has a file of this name already; rename one")
        for_image = any(columns.given.get(field) == ending for field in ("image", "images"))
        as_text = ending in (*_TEXTS, _CLASS, _JSON) or ending in columns.given.values()
        if for_image or f".{ending.rpartition('.')[2]}" in SUFFIXES:
            if member.size > LARGEST:
                raise DataError(f"it has {member.size:,} bytes, more than an image may have; leave it out")
            self.values[ending] = Piece(path, member.start, member.size) if path else _contents(file, member)
        elif as_text:
            if member.size > _LONGEST:
                raise DataError(f"it has {member.size:,} bytes, more than a text may have; leave it out")
            self.values[ending] = self._text(ending, _contents(file, member))

    def fields(self, path: Path, columns: Columns) -> dict[str, Any]:
        """Return the values of the sample by field."""
        found = {**self._noted, **self.values}
        pictures = [value for value in self.values.values() if isinstance(value, Piece | bytes)]
        if pictures and BASE64 not in columns.given:
            found["image"] = pictures[0]
        text = next((self.values[name] for name in _TEXTS if name in self.values), None)
        for field, value in (("text", text), ("answer", self.values.get(_CLASS))):
            if value is not None:
                found.setdefault(field, value)
        with about(f"{path}: sample '{self.key}'"):
            return {NAME: self.key, **columns.of(found)}

    def _text(self, ending: str, content: bytes) -> str:
        try:
            text = content.decode("utf-8-sig")
            if ending == _JSON:
                noted = parse_json(text)
                if not isinstance(noted, dict):
                    raise ValueError("it is no object")
                self._noted = noted
        except ValueError as error:  # of decoding, too
            raise DataError(
                f"it cannot be read as {'JSON' if ending == _JSON else 'text'} ({error}); mend it"
            ) from error
        return text.strip("\r\n") if ending in _TEXTS else text.strip()


def _contents(file: BinaryIO, member: Member) -> bytes:
    data = file.read(member.size)
    if len(data) < member.size:
        raise ValueError(f"it is cut off in '{member.name}'")
    return data


def _header(file: BinaryIO, position: int) -> bytes | None:
    """Read the header at a position; None at the end of the archive."""
    if file.tell() != position:
        file.seek(position)
    header = file.read(_BLOCK)
    if len(header) < _BLOCK:
        raise ValueError(f"it is cut off at byte {position + len(header):,}")
    if header[156:157] == _SPARSE:
        raise ValueError(f"the file at byte {position:,} is stored sparsely, which is not read")
    return header if any(header) else None


def _extension(file: BinaryIO, size: int, position: int) -> bytes:
    if size > _LONGEST_HEADER:
        raise ValueError(f"the header at byte {position:,} claims {size:,} bytes")
    data = file.read(size)
    if len(data) < size:
        raise ValueError(f"it is cut off at byte {position + len(data):,}")
    return data


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _size(header: bytes, position: int) -> int:
    """Return the size that a header gives, after comparing its checksum."""
    stored, field = _octal(header[148:156]), header[124:136]
    blanked = header[:148] + b" " * 8 + header[156:]
    signed = sum(byte - 256 if byte > 127 else byte for byte in blanked)
    if stored is None or stored not in (sum(blanked), signed):
        raise ValueError(f"at byte {position:,} there is no header of a file")
    size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)
    if size is None:
        raise ValueError(f"the header at byte {position:,} gives no size")
    return size


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _values(data: bytes) -> dict[bytes, bytes]:
    values, place = {}, 0
    while place < len(data):
        found = _VALUE.match(data, place)
        end = place + int(found[1]) if found and len(found[1]) < 8 else 0
        if found is None or not found.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise ValueError("a header of extended values is damaged")
        values[found[2]] = data[found.end() : end - 1]
        place = end
    return values


def _whole(text: bytes | None, default: int) -> int:
    if text is None:
        return default
    if not re.fullmatch(rb"\d{1,18}", text):
        raise ValueError("a header of extended values gives no size")
    return int(text)
