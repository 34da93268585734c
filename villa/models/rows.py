"""Arranging a batch as the rows that UNITER reads: one text and one image each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from villa.batch import Batch
from villa.errors import DataError

#: What a head reads of the last layer: the first position of every row (for the pooler), its regions, its masked tokens
#: or regions, or all of it. Nothing else of that layer is computed.
Reads = Literal["pooled", "regions", "masked_tokens", "masked_regions", "all"]


@dataclass(frozen=True)
class Rows:
    """N rows, each with one text and one image.

    Attributes:
        input_ids: ``[N, T]``.
        text_mask: ``[N, T]`` bool, or None when every token is real.
        token_types: ``[N, T]``, or ``[1, 1]`` when all are equal.
        features: ``[N, R, D]``.
        boxes: ``[N, R, 4 | 6 | 7]``.
        region_mask: ``[N, R]`` bool, or None when every region is real.
        image_types: ``[N | 1, R | 1]`` type of each region.
        examples: number of examples B.
        masked_regions: ``[N, R]`` bool, True where masked region modelling hides a region; None if it hides none.
        masked_tokens: ``[N, T]`` bool, True where masked language modelling asks for a token; None if nowhere.
    """

    input_ids: Tensor
    text_mask: Tensor | None
    token_types: Tensor
    features: Tensor
    boxes: Tensor
    region_mask: Tensor | None
    image_types: Tensor
    examples: int
    masked_regions: Tensor | None = None
    masked_tokens: Tensor | None = None

    def read(self, reads: Reads) -> Tensor | None:
        """Return where the read tokens or regions are in text followed by regions, ``[N, T + R]`` bool.

        None stands for all positions, and for the first of every row. Masks that a head reads by have to be there.
        """
        if reads in ("all", "pooled"):
            return None
        words = torch.zeros_like(self.input_ids, dtype=torch.bool)
        regions = words.new_zeros(self.features.shape[:2])
        if reads == "masked_tokens":
            assert self.masked_tokens is not None
            words = self.masked_tokens
        elif reads == "masked_regions":
            assert self.masked_regions is not None
            regions = self.masked_regions
        else:
            regions = given_mask(self.region_mask, regions)
        return torch.cat((words, regions), dim=1)


@dataclass(frozen=True)
class RowLayout:
    """How examples are arranged as rows.

    An example with C texts and I images becomes max(C, I) rows: text i with image i. A single text or image is
    repeated (VCR: one image for four texts; NLVR2: one text for two images; retrieval: any of these). Joint images
    are concatenated in one row instead.

    Attributes:
        images: images per example; None for any number.
        joint: put all images of an example into one row.
        typed_images: give image i the type 1 + i; otherwise every region has type 1.
    """

    images: int | None = 1
    joint: bool = False
    typed_images: bool = False

    def text_mask(self, batch: Batch) -> Tensor | None:
        """Return the rows' text mask, ``[N, T]`` bool, or None when every token is real."""
        return None if batch.attention_mask is None else self._text_rows(batch.attention_mask, batch)

    def region_mask(self, batch: Batch) -> Tensor | None:
        """Return the rows' region mask, ``[N, R]`` bool, or None when every region is real."""
        return None if batch.region_mask is None else self._image_rows(batch.region_mask, batch)

    def text_places(self, batch: Batch) -> Tensor:
        """Return where text is real in a row's text followed by its regions, ``[N, T + R]`` bool."""
        rows = self.rows(batch)
        text = given_mask(rows.text_mask, rows.input_ids)
        return torch.cat((text, text.new_zeros(rows.features.shape[:2])), dim=1)

    def region_places(self, batch: Batch) -> Tensor:
        """Return where regions are real in a row's text followed by its regions, ``[N, T + R]`` bool."""
        rows = self.rows(batch)
        regions = given_mask(rows.region_mask, rows.features[..., 0])
        return torch.cat((regions.new_zeros(rows.input_ids.shape), regions), dim=1)

    def visible_regions(self, batch: Batch) -> Tensor | None:
        """Return ``region_mask`` without the regions that masked region modelling hides."""
        real = self.region_mask(batch)
        if batch.masked_regions is None:
            return real
        seen = ~self._image_rows(batch.masked_regions, batch)
        return seen if real is None else real & seen

    def rows(self, batch: Batch) -> Rows:
        """Arrange a batch as rows.

        Raises:
            DataError: the batch lacks text, features or boxes, or its texts and images cannot be paired.
        """
        if batch.input_ids is None or batch.features is None or batch.boxes is None:
            missing = next(n for n in ("input_ids", "features", "boxes") if getattr(batch, n) is None)
            raise DataError(f"the model reads text and regions, but the batch has no {missing}: use another model")
        texts, images = self._counts(batch)
        if self.images not in (None, images):
            raise DataError(f"the head reads {self.images} image(s) an example, but the batch has {images}")
        if not (self.joint or texts == images or 1 in (texts, images)):
            raise DataError(f"an example has {texts} texts and {images} images; these cannot be paired")
        types = batch.token_type_ids
        return Rows(
            input_ids=self._text_rows(batch.input_ids, batch),
            text_mask=self.text_mask(batch),
            token_types=batch.input_ids.new_zeros(1, 1) if types is None else self._text_rows(types, batch),
            features=self._image_rows(batch.features, batch),
            boxes=self._image_rows(batch.boxes, batch),
            region_mask=self.region_mask(batch),
            image_types=self._image_types(batch.features),
            examples=len(batch.input_ids),
            masked_regions=None if batch.masked_regions is None else self._image_rows(batch.masked_regions, batch),
            masked_tokens=None if batch.masked_tokens is None else self._text_rows(batch.masked_tokens, batch),
        )

    def _counts(self, batch: Batch) -> tuple[int, int]:
        """Return the numbers of texts and images per example."""
        ids, features = batch.input_ids, batch.features
        texts = ids.shape[1] if ids is not None and ids.dim() == 3 else 1
        return texts, features.shape[1] if features is not None and features.dim() == 4 else 1

    def _text_rows(self, tensor: Tensor, batch: Batch) -> Tensor:
        """Map ``[B, T]`` or ``[B, C, T]`` to ``[N, T]``."""
        texts, images = self._counts(batch)
        flat = tensor.flatten(0, -2)
        return flat if self.joint or images in (texts, 1) else flat.repeat_interleave(images, dim=0)

    def _image_rows(self, tensor: Tensor, batch: Batch) -> Tensor:
        """Map ``[B, R, ...]`` or ``[B, I, R, ...]`` to ``[N, R, ...]``, or ``[N, I * R, ...]`` for joint images."""
        texts, images = self._counts(batch)
        if batch.features is not None and batch.features.dim() == 4:
            tensor = tensor.flatten(1, 2) if self.joint else tensor.flatten(0, 1)
        repeats = texts > 1 and (self.joint or images == 1)
        return tensor.repeat_interleave(texts, dim=0) if repeats else tensor

    def _image_types(self, features: Tensor) -> Tensor:
        if not self.typed_images:
            return torch.ones(1, 1, dtype=torch.long, device=features.device)
        assert self.images is not None, "typed images are counted"
        types = torch.arange(1, self.images + 1, device=features.device)
        if self.joint:
            return types.repeat_interleave(features.shape[2]).unsqueeze(0)
        return types.repeat(features.shape[0]).unsqueeze(1)


def given_mask(mask: Tensor | None, like: Tensor) -> Tensor:
    """Return the mask, or an all-True mask of the shape of ``like`` if there is none."""
    return torch.ones(like.shape, dtype=torch.bool, device=like.device) if mask is None else mask
