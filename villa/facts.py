"""What data, models and metrics exchange: sizes and names fixed by the data, generated texts, metrics' references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor  # slow to import

#: The kind of a task: choose a label, match images and texts, or generate an answer.
Task = Literal["classification", "contrastive", "generation"]

#: What each row of a parameter stands for: a token, or a label.
RowKind = Literal["tokens", "labels"]

#: Answer choices of a VCR question, and choices of its rationale.
CHOICES = 4

#: x, y, width, height in pixels.
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class PixelScale:
    """How a model's pixel values code colours in [0, 1]: ``value = (colour - mean) / std``, for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class DataFacts:
    """What the data determine about a model, so that its configuration may leave it open.

    Attributes:
        vocab_size: rows of the word embedding.
        num_labels: classes of the head.
        feature_dim: width of a region feature, or None without region features.
        task: kind of the task, or None if the data do not say.
        labels: names of the classes in the order of the logits, or None if they have none.
        tokens: tokens by id (None for an unused id), or None if unknown.
        padding: id of the padding token, or None if unknown.
        reading: preprocessing that the weights depend on: ``{"image size": "224"}``.
        pixels: scale of ``Batch.pixel_values``, or None without images or if it is unknown.
        label_texts: token ids of the text that stands for each label, in the order of the logits, or None.
    """

    vocab_size: int | None = None
    num_labels: int | None = None
    feature_dim: int | None = None
    task: Task | None = None
    labels: tuple[str, ...] | None = None
    tokens: tuple[str | None, ...] | None = None
    padding: int | None = None
    reading: Mapping[str, str] = field(default_factory=dict)
    pixels: PixelScale | None = field(default=None, compare=False)  # ``reading`` has it as words
    label_texts: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Written:
    """The texts generated for a batch.

    Attributes:
        tokens: ``[B, L]`` int64 token ids, -1 after the end of a text.
        scores: ``[B]`` probability of each text.
    """

    tokens: Tensor
    scores: Tensor


@dataclass(frozen=True)
class VcrReference:
    """The correct choices of a VCR question; None where they are unknown (test split).

    Attributes:
        answer: correct answer, 0 to 3.
        rationale: correct rationale given the correct answer, 0 to 3.
    """

    answer: int | None
    rationale: int | None


@dataclass(frozen=True)
class RetrievalReference:
    """The place of one text's scores for a few images in the matrix of all texts by all images.

    Attributes:
        text: row of the text.
        first_image: first column of the scored images, which are contiguous.
        right_image: column of the text's own image.
        shape: rows and columns of the whole matrix.
        text_id: name of the text.
        image_names: names of the scored images.
    """

    text: int
    first_image: int
    right_image: int
    shape: tuple[int, int]
    text_id: str
    image_names: Sequence[str]


@dataclass(frozen=True)
class RegionReference:
    """The target of a referring expression and the candidate regions, in pixels of the image.

    Attributes:
        target: the box referred to; None if unknown.
        boxes: the candidate regions.
    """

    target: Box | None
    boxes: Sequence[Box]


@dataclass(frozen=True)
class GroupReference:
    """What an example has in common with others, for metrics of groups and subsets; as its record gives it.

    Attributes:
        group: name of its group (rephrasings of one question, contrasts of one sentence), or None.
        subsets: names of the subsets of the split that it is in.
    """

    group: Any
    subsets: Any
