"""Visual Genome in its released form: relations between the objects of an image (Krishna et al., IJCV 2017)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from villa.datasets.linked.example import Box, Linked, Relation
from villa.errors import DataError, about
from villa.files import read_json
from villa.json_values import is_count, is_number

#: Names of the file with relations, of the newest version first.
RELATIONS = ("relationships.json", "relationships_v1_2.json", "relationships_v1_0.json")
#: Most region descriptions that make the text of an image.
_DESCRIPTIONS = 3


def read(path: Path, split: str | None = None) -> Iterator[Linked]:
    """Yield the images of a folder with ``relationships.json``, or of such a file.

    The text of an image are up to three of its region descriptions, those that overlap most of the related objects, or
    the relations in words if there is no ``region_descriptions.json``. Sizes are those of ``image_data.json``, if there
    is one. Images without a relation are left out.

    Raises:
        DataError: a file is missing or damaged; the message names it, and the entry.
    """
    if split is not None:
        raise DataError(f"probe.split={split} is not known: Visual Genome has no splits; leave it out")
    file = path if path.is_file() else next((path / name for name in RELATIONS if (path / name).is_file()), None)
    if file is None:
        raise DataError(f"'{path}' has no {RELATIONS[0]}; give the folder of Visual Genome, with its unzipped files")
    sizes = {image: (entry["width"], entry["height"]) for image, entry in _beside(file, "image_data.json").items()}
    described = _beside(file, "region_descriptions.json")
    for number, entry in enumerate(_entries(file), start=1):
        where = f"{file}: image {number}"
        with about(where):
            image = _id(entry)
            listed = entry.get("relationships")
            if not isinstance(listed, list):
                raise DataError("'relationships' is missing; take another copy of the file")
            found = [relation for relation in map(_relation, listed) if relation is not None]
            if not found:
                continue
            relations = tuple(relation for relation, _ in found)
            text = _description(described.get(image, {}), relations) or ". ".join(words for _, words in found)
            size = sizes.get(image)
            if size is not None and not all(is_number(side) and side > 0 for side in size):
                raise DataError(f"image {image} has the size {size!r:.40} in image_data.json; mend it")
        yield Linked(image, image, text, relations=relations, size=size, where=where)


def _relation(entry: Any) -> tuple[Relation, str] | None:
    """Return a relation, and its words; None if an object has no area, as some of the release have none."""
    if not isinstance(entry, dict):
        raise DataError(f"a relation is {entry!r:.40}, not an object; take another copy of the file")
    predicate = entry.get("predicate")
    if not isinstance(predicate, str):
        raise DataError(f"'predicate' is {predicate!r:.40}; it must be a text")
    kind = " ".join(predicate.lower().split())
    (subject, name), (other, what) = (_object(entry.get(side), side) for side in ("subject", "object"))
    if subject is None or other is None or not kind:
        return None
    return Relation(subject, other, kind), f"{name} {kind} {what}"


def _object(entry: Any, side: str) -> tuple[Box | None, str]:
    if not isinstance(entry, dict):
        raise DataError(f"'{side}' is {entry!r:.40}; it must be an object with x, y, w, h and name")
    numbers = [entry.get(key) for key in ("x", "y", "w", "h")]
    if not all(map(is_number, numbers)):
        raise DataError(f"'{side}' has the box {numbers!r:.60}; it must have numbers x, y, w, h")
    names = entry.get("names", [entry.get("name", "")])
    name = names[0] if isinstance(names, list) and names else ""
    if not isinstance(name, str):
        raise DataError(f"'{side}' has the name {name!r:.40}; it must be a text")
    x, y, w, h = (float(number) for number in numbers if number is not None)
    return ((x, y, x + w, y + h) if w > 0 and h > 0 else None), name


def _beside(file: Path, name: str) -> Mapping[str, dict[str, Any]]:
    """Return the entries of another file by image, or nothing if it is not there."""
    path = file.parent / name
    if not path.is_file():
        return {}
    found = {}
    for number, entry in enumerate(_entries(path), start=1):
        with about(f"{path}: image {number}"):
            found[_id(entry)] = entry
            if name == "image_data.json" and not {"width", "height"} <= entry.keys():
                raise DataError("'width' or 'height' is missing")
    return found


def _entries(path: Path) -> list[Any]:
    entries = read_json(path, "file of Visual Genome")
    if not isinstance(entries, list):
        raise DataError(f"'{path}' must hold a list with an entry for each image; take another copy")
    return entries


def _id(entry: Any) -> str:
    value = entry.get("image_id", entry.get("id")) if isinstance(entry, dict) else None
    if not is_count(value):
        raise DataError(f"'image_id' is {value!r:.40}; it must be a number")
    return str(value)


def _description(entry: Mapping[str, Any], relations: tuple[Relation, ...]) -> str:
    """Return the descriptions that overlap most of the related objects, in the file's order."""
    boxes = [box for relation in relations for box in (relation.subject, relation.object)]
    found: list[tuple[int, int, str]] = []
    for number, region in enumerate(entry.get("regions", [])):
        sides: list[Any] = (
            [region.get(key) for key in ("x", "y", "width", "height")] if isinstance(region, dict) else [0]
        )
        if len(sides) < 4 or not all(map(is_number, sides)) or not isinstance(region.get("phrase"), str):
            raise DataError(f"region {number + 1} of region_descriptions.json has no phrase, x, y, width or height")
        x, y, w, h = sides
        count = sum(b[0] < x + w and x < b[2] and b[1] < y + h and y < b[3] for b in boxes)
        if count and region["phrase"].strip():
            found.append((-count, number, region["phrase"].strip().rstrip(".")))
    chosen = sorted(sorted(found)[:_DESCRIPTIONS], key=lambda one: one[1])
    return ". ".join(text for _, _, text in chosen)
