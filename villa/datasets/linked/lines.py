"""A user's own links, in JSON lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from villa.datasets.linked.example import Link, Linked, Relation, box_of
from villa.datasets.own.records import JsonLines, beside, record_id, record_texts, text_field
from villa.errors import DataError, about
from villa.json_values import is_number


def read(path: Path, split: str | None = None) -> Iterator[Linked]:
    """Yield the records of a file of the user's own.

    A line is ``{"image": path, "text": text, "links": [{"span": [start, end], "box": [x1, y1, x2, y2], "type": text}],
    "relations": [{"subject": box, "object": box, "type": text}]}``. Instead of ``box``, ``boxes`` lists several.
    ``features`` names a feature file; ``size`` is the width and height that boxes are in, by default the image's.

    Raises:
        DataError: the file is missing, or a line is damaged; the message names it.
    """
    if split is not None:
        raise DataError(f"probe.split={split} is not known: give the file of the split (probe.path)")
    lines = JsonLines(path)
    for index, record in enumerate(lines):
        where = lines.where(index)
        with about(where):
            size = _size(record.get("size"))
            text, _ = record_texts(record)
            links = tuple(_link(entry, text, size) for entry in _listed(record, "links"))
            relations = tuple(_relation(entry, size) for entry in _listed(record, "relations"))
            named = {**record, **beside(path.parent, record)}
            files = tuple((name, str(named[name])) for name in ("image", "features") if name in record)
            if not files:
                raise DataError("'image' (or 'features') is missing; name the file")
            name = record_id(record, str(lines.number(index)))
        yield Linked(name, files[0][1], text, links, relations, size, files, where)


def _listed(record: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    entries = record.get(name, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"'{name}' is {entries!r:.40}; it must be a list of objects")
    return entries


def _size(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(is_number(side) and side > 0 for side in value)):
        raise DataError(f"'size' is {value!r:.40}; it must be the width and height of the image in pixels")
    return float(value[0]), float(value[1])


def _link(entry: Mapping[str, Any], text: str, size: tuple[float, float] | None) -> Link:
    span = entry.get("span")
    if not (isinstance(span, list) and len(span) == 2 and all(type(place) is int for place in span)):
        raise DataError(f"'span' is {span!r:.40}; it must be [start, end], in characters of the text")
    start, end = span
    if not 0 <= start < end <= len(text) or not text[start:end].strip():
        raise DataError(f"the span [{start}, {end}] holds no word of the text, which has {len(text)} characters")
    boxes = entry["boxes"] if "boxes" in entry else [entry.get("box")]
    if not (isinstance(boxes, list) and boxes):
        raise DataError(f"'boxes' is {boxes!r:.40}; it must be a list of boxes")
    return Link((start, end), tuple(box_of(box, size) for box in boxes), (text_field(entry, "type"),))


def _relation(entry: Mapping[str, Any], size: tuple[float, float] | None) -> Relation:
    return Relation(box_of(entry.get("subject"), size), box_of(entry.get("object"), size), text_field(entry, "type"))
