"""Attention cut by modality, in one form for all models: text to text, text to image, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from villa.batch import Batch
from villa.errors import ConfigError, DataError
from villa.models.rows import Rows, given_mask


@dataclass(frozen=True)
class LayerMaps:
    """The attention of a layer to an example with T text tokens and R regions or patches; None where it has none.

    Attributes:
        name: such as ``layer 3``.
        text_text: ``[heads, T, T]``, by query and key.
        text_image: ``[heads, T, R]``, from text to image.
        image_text: ``[heads, R, T]``.
        image_image: ``[heads, R, R]``.
        pooled: ``[heads, 2]``, what the position that is pooled gives to all text and to the whole image, if it chooses
            between them.
    """

    name: str
    text_text: Tensor | None = None
    text_image: Tensor | None = None
    image_text: Tensor | None = None
    image_image: Tensor | None = None
    pooled: Tensor | None = None

    @property
    def heads(self) -> int:
        """Number of heads."""
        return next(len(part) for part in (self.text_text, self.image_image, self.text_image) if part is not None)


@dataclass(frozen=True)
class ExampleAttention:
    """What a model attends to in one example.

    Attributes:
        layers: the layers that have maps, in order.
        tokens: ``[T]`` places of the text in the example's row of ``Batch.input_ids``.
        boxes: ``[R, 4]`` x1, y1, x2, y2 of every region or patch, divided by the image's width and height.
        grid: rows and columns of patches; None for regions.
        states: of every layer, with the embedding first, the states of text ``[T, D]`` and image ``[R, D]``.
    """

    layers: tuple[LayerMaps, ...]
    tokens: Tensor
    boxes: Tensor
    grid: tuple[int, int] | None = None
    states: tuple[tuple[Tensor, Tensor], ...] = ()


def cut(
    name: str, attention: Tensor, text: Tensor, image: Tensor, *, around: Tensor | None = None, pooled: int | None = 0
) -> LayerMaps:
    """Cut a map over text and image by modality.

    Args:
        name: name of the layer.
        attention: ``[heads, L, L]``.
        text: ``[T]`` positions of text.
        image: ``[R]`` positions of regions or patches.
        around: all positions of the image, if there are others than ``image``.
        pooled: the position that is pooled; None if there is none.
    """
    attention, whole = attention.detach().float().cpu(), image if around is None else around

    def part(queries: Tensor, keys: Tensor) -> Tensor:
        return attention[:, queries][:, :, keys]

    read = None
    if pooled is not None:
        read = torch.stack([attention[:, pooled, keys].sum(-1) for keys in (text, whole)], dim=-1)
    return LayerMaps(name, part(text, text), part(text, image), part(image, text), part(image, image), read)


def of_regions(rows: Rows, maps: Sequence[Tensor], states: Sequence[Tensor], *, packed: bool) -> list[ExampleAttention]:
    """Return the attention of a model that reads tokens and regions in one sequence.

    Args:
        rows: the rows.
        maps: ``[N, heads, L, L]`` of every layer.
        states: ``[N, L, hidden]`` after the embedding and every layer.
        packed: whether the real positions of a row come first; otherwise regions are behind the longest text.
    """
    found = []
    for row, (tokens, regions) in enumerate(counts(rows)):
        width = tokens if packed else rows.input_ids.shape[1]
        text, image = torch.arange(tokens), torch.arange(width, width + regions)
        layers = tuple(cut(f"layer {n}", layer[row], text, image) for n, layer in enumerate(maps, start=1))
        found.append(
            ExampleAttention(layers, text, corners(rows, row, regions), states=parts(states, row, text, image))
        )
    return found


def check_single(images: int | None, batch: Batch) -> None:
    """Refuse examples of several texts or images, whose maps would need a choice.

    Args:
        images: images that the model reads in an example; None for any number.
        batch: the examples.

    Raises:
        ConfigError: there are such.
    """
    texts = batch.input_ids is not None and batch.input_ids.dim() > 2
    seen = batch.features is not None and batch.features.dim() > 3
    if (images or 1) > 1 or texts or seen:
        raise ConfigError(
            "attention is shown for one text and one image an example, but this model's task has several; use a model "
            "that was trained on questions or captions"
        )


def counts(rows: Rows) -> list[tuple[int, int]]:
    """Return the numbers of real tokens and real regions of every row."""
    text = given_mask(rows.text_mask, rows.input_ids).sum(1).tolist()
    regions = given_mask(rows.region_mask, rows.features[..., 0]).sum(1).tolist()
    return list(zip(text, regions, strict=True))


def corners(rows: Rows, row: int, regions: int) -> Tensor:
    """Return x1, y1, x2, y2 of a row's regions, ``[regions, 4]``."""
    return rows.boxes[row, :regions, :4].float().cpu()


def parts(states: Sequence[Tensor], row: int, text: Tensor, image: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return the states of a row's text and image, from those of all positions of all rows."""
    return tuple(
        (state[row, text].detach().float().cpu(), state[row, image].detach().float().cpu()) for state in states
    )


def grid_boxes(rows: int, columns: int) -> Tensor:
    """Return the boxes ``[rows * columns, 4]`` of a grid of patches that covers the image, row by row."""
    y, x = torch.meshgrid(torch.arange(rows) / rows, torch.arange(columns) / columns, indexing="ij")
    return torch.stack((x, y, x + 1 / columns, y + 1 / rows), dim=-1).view(-1, 4)


def in_prompts(
    batch: Batch,
    maps: Sequence[Tensor],
    states: Sequence[Tensor],
    image_token: int,
    grid: Callable[[int, int], tuple[int, int] | None],
) -> list[ExampleAttention]:
    """Return the attention of a causal language model whose prompts hold image tokens.

    Nothing attends from the image to a text behind it; the last token of the prompt is the one that is pooled.

    Args:
        batch: the prompts.
        maps: ``[B, heads, L, L]`` of every layer.
        states: ``[B, L, hidden]`` after the embedding and every layer.
        image_token: id of the image tokens.
        grid: returns rows and columns of an example's image, given its number among the examples and the number of its
            tokens; None if they are not known.

    Raises:
        DataError: the tokens of an image are not a grid.
    """
    assert batch.input_ids is not None
    real = given_mask(batch.attention_mask, batch.input_ids).bool()
    found = []
    for row, ids in enumerate(batch.input_ids):
        shown = ids == image_token
        text, image = (place.nonzero().flatten().cpu() for place in (real[row] & ~shown, shown))
        sides = grid(row, len(image))
        if sides is None:
            raise DataError(
                f"example '{batch.ids[row]}' has {len(image)} image tokens, which are not one grid of patches; "
                "attention is shown for models that read an image as one grid"
            )
        last = int(text[-1])
        layers = []
        for number, layer in enumerate(maps, start=1):
            whole = cut(f"layer {number}", layer[row], text, image, pooled=last)
            layers.append(LayerMaps(whole.name, whole.text_text, whole.text_image, pooled=whole.pooled))
        both = parts(states, row, text, image)
        found.append(ExampleAttention(tuple(layers), text, grid_boxes(*sides), sides, both))
    return found


def square(tokens: int) -> tuple[int, int] | None:
    """Return the sides of a square grid of so many patches, or None if there is none."""
    side = math.isqrt(tokens)
    return (side, side) if side and side * side == tokens else None
