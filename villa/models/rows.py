"""Arranging a batch as the rows that UNITER reads: one text and one image each, packed without padding between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from villa.batch import Batch
from villa.errors import DataError


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


@dataclass(frozen=True)
class Packing:
    """The packing of each row's tokens and regions into one sequence, real positions first.

    Attributes:
        length: length L of the longest row.
        text_lengths: ``[N]`` real tokens per row, or their common number.
        order: ``[N, L]`` indices into text followed by regions, or None when no reordering is needed.
        mask: ``[N, L]`` bool, True on real positions, or None when all are real.
    """

    length: int
    text_lengths: Tensor | int
    order: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(cls, rows: Rows) -> Packing:
        """Derive the packing from the masks of ``rows``."""
        if rows.text_mask is None and rows.region_mask is None:
            width = rows.input_ids.shape[1]
            return cls(width + rows.features.shape[1], width)
        text = given_mask(rows.text_mask, rows.input_ids)
        valid = torch.cat((text, given_mask(rows.region_mask, rows.features[..., 0])), dim=1)
        lengths, text_lengths = valid.sum(dim=1), text.sum(dim=1)
        # The following shapes depend on these three numbers: the only host synchronisation of a pass.
        facts = torch.stack((lengths.amax(), lengths.amin(), text_lengths.amin()))
        longest, shortest, shortest_text = facts.tolist()
        order = None
        if shortest_text < text.shape[1]:
            # A stable sort keeps the order of tokens and regions.
            order = valid.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
        if shortest == longest:
            return cls(longest, text_lengths, order)
        places = torch.arange(longest, device=lengths.device)
        return cls(longest, text_lengths, order, places < lengths.unsqueeze(1))

    def pack(self, text: Tensor, image: Tensor) -> Tensor:
        """Pack ``[N, T, hidden]`` and ``[N, R, hidden]`` into ``[N, L, hidden]``."""
        if self.order is None:
            return torch.cat((text, image[:, : self.length - text.shape[1]]), dim=1)
        both = torch.cat((text, image), dim=1)
        return both.gather(1, self.order.unsqueeze(-1).expand(-1, -1, both.shape[-1]))

    def words(self, states: Tensor, count: int) -> Tensor:
        """Return the states ``[N, count, hidden]`` of the first ``count`` tokens of packed ``[N, L, hidden]``.

        Values beyond a row's tokens are arbitrary.
        """
        missing = count - states.shape[1]
        return states[:, :count] if missing <= 0 else F.pad(states, (0, 0, 0, missing))

    def regions(self, states: Tensor, count: int) -> Tensor:
        """Return the states ``[N, count, hidden]`` of the first ``count`` regions of packed ``[N, L, hidden]``.

        Values beyond a row's regions are arbitrary.
        """
        places = torch.arange(count, device=states.device)
        if isinstance(self.text_lengths, int):
            return states[:, self.text_lengths : self.text_lengths + count]
        index = (self.text_lengths.unsqueeze(1) + places).clamp(max=self.length - 1)
        return states.gather(1, index.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def given_mask(mask: Tensor | None, like: Tensor) -> Tensor:
    """Return the mask, or an all-True mask of the shape of ``like`` if there is none."""
    return torch.ones(like.shape, dtype=torch.bool, device=like.device) if mask is None else mask
