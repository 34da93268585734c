"""The scenes of NLVR v1 as linked texts: words for colours, shapes and sizes, and relations of places."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from villa.datasets.linked.example import Link, Linked, Relation
from villa.datasets.own.nlvr_scenes import PICTURE, Shown, file_of, read_scenes
from villa.datasets.own.pictures import read_picture
from villa.datasets.stores import ImageSource
from villa.errors import about

#: Words of the sentences and the objects that they stand for: what they tell, its type, and its value.
_WORDS: dict[str, tuple[str, str, Any]] = {
    **{word: ("colour", "colour", word.capitalize()) for word in ("yellow", "black")},
    "blue": ("colour", "colour", "#0099ff"),
    **{f"{word}{end}": ("shape", "shape", word) for word in ("circle", "triangle", "square") for end in ("", "s")},
    **{f"{word}{end}": ("shape", "shape", None) for word in ("item", "object", "shape", "block") for end in ("", "s")},
    **{word: ("side", "size", side) for word, side in (("small", 10), ("medium", 20), ("big", 30), ("large", 30))},
}
#: Pixels between objects that touch.
_TOUCHING = 1


def read(path: Path, split: str | None = None) -> Iterator[Linked]:
    """Yield the sentences with their scenes, one picture each, from the released layout.

    Words are linked to the objects that they fit; relations (``above``, ``left of``, ``touching``) are those of the
    objects' places. Sentences without a link and a relation are left out.

    Args:
        path: the file, the folder of the split, or the folder with those of all splits.
        split: name of the split, for the latter; ``dev`` by default.

    Raises:
        DataError: a file is missing, a line is damaged, or a picture shows another scene.
    """
    alone = path.is_file() or (path / f"{path.name}.json").is_file()
    for scene in read_scenes(file_of(path, split or (None if alone else "dev"))).values():
        file = next(iter(scene.pictures.values()))
        with about(scene.where):
            shown = scene.shown(read_picture(ImageSource(file, scene.where)))
        links, relations = tuple(_links(scene.sentence, shown)), tuple(_relations(shown))
        if links or relations:
            size, files = (float(PICTURE[0]), float(PICTURE[1])), (("image", str(file)), ("features", str(file)))
            yield Linked(scene.identifier, scene.identifier, scene.sentence, links, relations, size, files, scene.where)


def _links(text: str, shown: Sequence[Shown]) -> Iterator[Link]:
    for match in re.finditer(r"[A-Za-z]+", text):
        if match[0].lower() not in _WORDS:
            continue
        field, kind, value = _WORDS[match[0].lower()]
        boxes = tuple(box for _, thing, box in shown if value is None or getattr(thing, field) == value)
        if boxes:
            yield Link(match.span(), boxes, (kind,))


def _relations(shown: Sequence[Shown]) -> Iterator[Relation]:
    for place, _, one in shown:
        for there, _, other in shown:
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
