"""What data and models tell each other: sizes and names that the data fix, answers, and what metrics compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor  # takes long to import

#: What is asked of a model: to choose a label, to match images and texts, or to write an answer.
Task = Literal["classification", "contrastive", "generation"]

#: What each row of a parameter stands for: a word-piece, or a label.
RowKind = Literal["tokens", "labels"]

#: Choices of a VCR question, and of its rationale.
CHOICES = 4

#: x, y, width, height in pixels.
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class DataFacts:
    """What the data fixes about a model; a model's configuration may leave these open.

    Attributes:
        vocab_size: rows of the word embedding.
        num_labels: classes of the head.
        feature_dim: width of a region feature, or None without region features.
        task: what the targets ask for, or None where the data does not say.
        labels: names of the classes, in the order of the logits, or None where they have none.
        tokens: word-pieces by their ids (None for an id without one), or None where the data do not know them.
        padding: id of the word-piece that texts are padded with, or None where it is not known.
        reading: how texts and images are read, as far as weights depend on it: ``{"image size": "224"}``.
    """

    vocab_size: int | None = None
    num_labels: int | None = None
    feature_dim: int | None = None
    task: Task | None = None
    labels: tuple[str, ...] | None = None
    tokens: tuple[str | None, ...] | None = None
    padding: int | None = None
    reading: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """What a generative model wrote for a batch.

    Attributes:
        tokens: ``[B, L]`` int64 token ids, -1 behind the end of a text.
        scores: ``[B]`` probability of each text.
    """

    tokens: Tensor
    scores: Tensor


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
