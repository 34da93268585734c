"""A user's own links, and the scenes of NLVR, both in JSON lines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from PIL import Image

from villa.datasets.linked.example import Box, Link, Linked, Relation, box_of
from villa.datasets.own.pictures import read_picture
from villa.datasets.own.records import JsonLines, beside, record_id, record_texts, text_field
from villa.datasets.stores import ImageSource
from villa.errors import DataError, about
from villa.json_values import is_number


def read_lines(path: Path, split: str | None = None) -> Iterator[Linked]:
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


#: Words of NLVR's sentences and the objects that they stand for: field, and value.
_WORDS: dict[str, tuple[str, str, Any]] = {
    **{word: ("color", "colour", word.capitalize()) for word in ("yellow", "black")},
    "blue": ("color", "colour", "#0099ff"),
    **{f"{word}{end}": ("type", "shape", word) for word in ("circle", "triangle", "square") for end in ("", "s")},
    **{f"{word}{end}": ("type", "shape", None) for word in ("item", "object", "shape", "block") for end in ("", "s")},
    **{word: ("size", "size", size) for word, size in (("small", 10), ("medium", 20), ("big", 30), ("large", 30))},
}
_COLOURS = {"Yellow": (255, 255, 0), "Black": (0, 0, 0), "#0099ff": (0, 153, 255)}
#: Left edge and side of the three boxes of a picture, and its size.
_EDGES, _SIDE, _PICTURE = (0, 150, 300), 100, (400.0, 100.0)
#: Pixels between objects that touch, and squared distance of colours that are told apart.
_TOUCHING, _FAR = 1, 10_000


def read_nlvr(path: Path, split: str | None = None) -> Iterator[Linked]:
    """Yield the sentences of NLVR v1 with their scenes, one picture each, from its released layout.

    Words for colours, shapes and sizes are linked to the objects that they fit; relations (``above``, ``left of``,
    ``touching``) are those of the objects' places. A picture shows the boxes in an order of its own, which is found
    from its pixels. Sentences without a link and a relation are left out.

    Args:
        path: the file, the folder of the split, or the folder with those of all splits.
        split: name of the split, for the latter; ``dev`` by default.

    Raises:
        DataError: a file is missing, a line is damaged, or a picture shows another scene.
    """
    folder = path.parent if path.is_file() else path
    if path.is_dir():
        name = split or (path.name if (path / f"{path.name}.json").is_file() else "dev")
        folder = path if (path / f"{name}.json").is_file() else path / name
        path = folder / f"{name}.json"
    lines = JsonLines(path)
    for index, record in enumerate(lines):
        where = lines.where(index)
        with about(where):
            text, identifier = text_field(record, "sentence"), text_field(record, "identifier")
            scene = _scene(record.get("structured_rep"))
            file = _picture(folder / "images", path.stem, identifier, record.get("directory"))
            objects = _placed(scene, read_picture(ImageSource(file, where)))
        links, relations = tuple(_links(text, objects)), tuple(_relations(objects))
        if links or relations:
            yield Linked(identifier, identifier, text, links, relations, _PICTURE, (("image", str(file)),), where)


Object = Mapping[str, Any]


def _scene(value: Any) -> list[list[Object]]:
    boxes: list[Any] = value if isinstance(value, list) else []
    if len(boxes) != len(_EDGES) or not all(isinstance(box, list) for box in boxes):
        raise DataError("'structured_rep' must be a list of three boxes, each a list of objects")
    every: list[Any] = [entry for box in boxes for entry in box]
    for entry in every:
        numbers = isinstance(entry, dict) and all(is_number(entry.get(key)) for key in ("x_loc", "y_loc", "size"))
        if not numbers or entry.get("color") not in _COLOURS or not isinstance(entry.get("type"), str):
            raise DataError(f"{entry!r:.80} is no object with x_loc, y_loc, size, type and color")
    return boxes


def _picture(images: Path, split: str, identifier: str, directory: Any) -> Path:
    """Return the first picture of a scene; the file of one split does not say in which folder they are."""
    folders = sorted(images.glob("*")) if directory is None else [images / str(directory)]
    names = [folder / f"{split}-{identifier}-{number}.png" for folder in folders for number in range(6)]
    found = next((name for name in names if name.is_file()), None)
    if found is None:
        raise DataError(f"'{images}' has no picture {split}-{identifier}-0.png; add the folder 'images' of the release")
    return found


def _placed(scene: list[list[Object]], picture: Image.Image) -> list[tuple[int, Object, Box]]:
    """Return box, object and place of every object, with the boxes in the order that the picture shows."""
    if (float(picture.width), float(picture.height)) != _PICTURE:
        raise DataError(f"the picture has {picture.width} x {picture.height} pixels, and those of NLVR 400 x 100")

    def wrong(order: Sequence[int]) -> int:
        return sum(_misses(picture, entry, _EDGES[place]) for place, box in enumerate(order) for entry in scene[box])

    best = min(permutations(range(len(scene))), key=wrong)
    if wrong(best):
        raise DataError(f"the picture does not show {wrong(best)} of the scene's objects; take another copy")
    found = []
    for place, box in enumerate(best):
        for entry in scene[box]:
            x, y, side = entry["x_loc"] + _EDGES[place], entry["y_loc"], entry["size"]
            found.append((place, entry, (float(x), float(y), float(x + side), float(y + side))))
    return found


def _misses(picture: Image.Image, entry: Object, left: int) -> bool:
    """Return whether a picture has another colour in the middle of an object."""
    x, y = (int(entry[key] + entry["size"] / 2) for key in ("x_loc", "y_loc"))
    pixel: Any = picture.getpixel((min(max(left + x, left), left + _SIDE - 1), min(max(y, 0), _SIDE - 1)))
    return bool(sum((a - b) ** 2 for a, b in zip(pixel, _COLOURS[entry["color"]], strict=True)) > _FAR)


def _links(text: str, objects: Sequence[tuple[int, Object, Box]]) -> Iterator[Link]:
    for match in re.finditer(r"[A-Za-z]+", text):
        if match[0].lower() not in _WORDS:
            continue
        field, kind, value = _WORDS[match[0].lower()]
        boxes = tuple(box for _, entry, box in objects if value is None or entry[field] == value)
        if boxes:
            yield Link(match.span(), boxes, (kind,))


def _relations(objects: Sequence[tuple[int, Object, Box]]) -> Iterator[Relation]:
    for place, _, one in objects:
        for there, _, other in objects:
            if place != there or one == other:
                continue
            across = one[0] < other[2] and other[0] < one[2]
            along = one[1] < other[3] and other[1] < one[3]
            if across and one[3] <= other[1]:
                yield Relation(one, other, "above")
            if along and one[2] <= other[0]:
                yield Relation(one, other, "left of")
            near = (across and 0 <= other[1] - one[3] <= _TOUCHING) or (along and 0 <= other[0] - one[2] <= _TOUCHING)
            if near:
                yield Relation(one, other, "touching")
