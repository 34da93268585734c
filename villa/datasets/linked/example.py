"""One image with a text, links of words to boxes, and relations between boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from villa.errors import DataError
from villa.json_values import is_number

#: x1, y1, x2, y2.
Box = tuple[float, float, float, float]

#: Pixels by which a box of the user's own may stick out of its image.
_SLACK = 1.0


@dataclass(frozen=True)
class Link:
    """Words that stand for what is in boxes.

    Attributes:
        span: first character of the words in the text, and the one behind them.
        boxes: each box is a pair with the words.
        types: types of what the words stand for; the pairs count for each of them.
    """

    span: tuple[int, int]
    boxes: tuple[Box, ...]
    types: tuple[str, ...]


@dataclass(frozen=True)
class Relation:
    """A relation between the contents of two boxes."""

    subject: Box
    object: Box
    type: str


@dataclass(frozen=True)
class Linked:
    """A text about an image.

    Attributes:
        id: unique.
        image: name of the image, which several texts may share.
        text: the text.
        links: its links.
        relations: relations in the image.
        size: width and height that the boxes are in; None for those of the image file.
        files: the record's fields that name files (``image``, ``features``), as far as they are known.
        where: its place in a file, for messages.
    """

    id: str
    image: str
    text: str
    links: tuple[Link, ...] = ()
    relations: tuple[Relation, ...] = ()
    size: tuple[float, float] | None = None
    files: tuple[tuple[str, str], ...] = ()
    where: str = ""

    def normalised(self, size: tuple[float, float]) -> Linked:
        """Return the example with boxes as fractions of the image, clipped to it; empty ones are left out.

        Args:
            size: width and height of the image.
        """
        links = []
        for link in self.links:
            boxes = tuple(box for box in (_fraction(box, size) for box in link.boxes) if box is not None)
            if boxes:
                links.append(replace(link, boxes=boxes))
        relations = []
        for relation in self.relations:
            subject, other = _fraction(relation.subject, size), _fraction(relation.object, size)
            if subject is not None and other is not None:
                relations.append(Relation(subject, other, relation.type))
        return replace(self, links=tuple(links), relations=tuple(relations), size=(1.0, 1.0))


def _fraction(box: Box, size: tuple[float, float]) -> Box | None:
    """Return a box in pixels as fractions of the image, clipped to it; None if nothing is left."""
    width, height = size
    x1, y1, x2, y2 = (min(max(value / side, 0.0), 1.0) for value, side in zip(box, (width, height) * 2, strict=True))
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def box_of(values: Any, size: Sequence[float] | None = None) -> Box:
    """Return a box that a file gives as x1, y1, x2, y2 in pixels.

    Args:
        values: what the file holds.
        size: width and height that it must lie in; None does not check that.

    Raises:
        DataError: it is none.
    """
    if not (isinstance(values, list | tuple) and len(values) == 4 and all(map(is_number, values))):
        raise DataError(f"a box is {values!r:.60}; give four numbers, x1, y1, x2, y2 in pixels")
    x1, y1, x2, y2 = map(float, values)
    if x2 <= x1 or y2 <= y1:
        raise DataError(f"the box {values!r:.60} is empty or turned around; give x1, y1, x2, y2 with x1 < x2, y1 < y2")
    if size is not None and (min(x1, y1) < -_SLACK or x2 > size[0] + _SLACK or y2 > size[1] + _SLACK):
        raise DataError(f"the box {values!r:.60} sticks out of its image of {size[0]:g} x {size[1]:g} pixels; mend it")
    return x1, y1, x2, y2
