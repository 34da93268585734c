"""What the metrics and decoders of single tasks compare with: entries of ``Batch.references``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: x, y, width, height in pixels.
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class VcrReference:
    """The right choices of a VCR question; None where they are not known (test).

    Attributes:
        answer: right answer, 0 to 3.
        rationale: right rationale given the right answer, 0 to 3.
    """

    answer: int | None
    rationale: int | None


@dataclass(frozen=True)
class RetrievalReference:
    """Where the scores of one text with a few images belong in the matrix of all texts and images.

    Attributes:
        text: row of the text.
        first_image: column of the first of the images, which are neighbours.
        right_image: column of the text's own image.
        shape: rows and columns of the whole matrix.
        text_id: name of the text.
        image_names: names of the images scored.
    """

    text: int
    first_image: int
    right_image: int
    shape: tuple[int, int]
    text_id: str
    image_names: Sequence[str]


@dataclass(frozen=True)
class RegionReference:
    """What a referring expression means, and the regions to choose from, in pixels of the image.

    Attributes:
        target: the box meant; None where it is not known.
        boxes: the regions.
    """

    target: Box | None
    boxes: Sequence[Box]
