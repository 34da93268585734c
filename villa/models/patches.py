"""Patches of images of several sizes in one batch: where they are, and which of them are real."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Patches:
    """N maps of patches.

    Attributes:
        values: ``[N, width, h, w]``.
        mask: ``[N, h, w]`` bool, True on real patches, the upper left part of each map; None when all are real.
    """

    values: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, values: Tensor, pixel_mask: Tensor | None) -> Patches:
        """Take patches ``[N, width, h, w]``, and the mask ``[N, H, W]`` of their images' pixels or None."""
        if pixel_mask is None:
            return cls(values, None)
        return cls(values, cls.real(pixel_mask, (values.shape[2], values.shape[3])))

    @staticmethod
    def real(pixel_mask: Tensor, grid: tuple[int, int]) -> Tensor:
        """``[N, h, w]`` bool: a patch is real where its first pixel is.

        Args:
            pixel_mask: ``[N, H, W]``, not 0 on real pixels.
            grid: h and w.
        """
        return F.interpolate(pixel_mask[:, None].float(), size=grid)[:, 0] > 0

    def placed(self, positions: Tensor, side: int) -> Tensor:
        """Add positions, stretched over the real part of each map.

        Args:
            positions: ``[1, side * side, width]``.
            side: patches a side that they are made for.

        Returns:
            ``[N, h * w, width]``.
        """
        square = positions.transpose(1, 2).reshape(1, -1, side, side)
        height, width = self.values.shape[2:]
        sizes = [(height, width)]
        if self.mask is not None:
            rows, columns = self.mask[:, :, 0].sum(dim=1), self.mask[:, 0].sum(dim=1)
            sizes = [(h, w) for h, w in torch.stack((rows, columns), dim=1).tolist()]
        made = {size: _stretched(square, size, (height, width)) for size in dict.fromkeys(sizes)}
        added = torch.cat([made[size] for size in sizes])
        return (self.values + added).flatten(2).transpose(1, 2)

    def packed(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Bring the real patches of each map to the front, and cut off what is padding in all of them.

        Args:
            tokens: ``[N, h * w, width]``.

        Returns:
            ``[N, P, width]`` and their mask ``[N, P]``, or None when all are real.
        """
        if self.mask is None:
            return tokens, None
        real = self.mask.flatten(1)
        lengths = real.sum(dim=1)
        longest, shortest = torch.stack((lengths.amax(), lengths.amin())).tolist()
        if shortest == real.shape[1]:
            return tokens, None
        # A stable sort keeps the order of the patches.
        order = real.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
        kept = tokens.gather(1, order.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        return kept, None if shortest == longest else real.gather(1, order)


def _stretched(square: Tensor, size: tuple[int, int], whole: tuple[int, int]) -> Tensor:
    """Positions ``[1, width, side, side]`` stretched to ``size``, with zeros up to the ``whole`` size."""
    stretched = F.interpolate(square, size=size, mode="bilinear", align_corners=True)
    return F.pad(stretched, (0, whole[1] - size[1], 0, whole[0] - size[0]))
