"""An extractor that takes no time, and which of the fixture ``photos`` are broken."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from villa.extraction.base import Extractor, Regions, parse_boxes

#: Names of the photos that are no images.
BROKEN = {"cut", "empty", "text"}


class Means(Extractor):
    """Mean colours of the quarters of an image."""

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__(config, device)
        self.selection = parse_boxes("4")

    @property
    def signature(self) -> str:
        return "means 1 0123456789abcdef plain"

    def read(self, picture: Image.Image) -> Any:
        return np.asarray(picture.resize((2, 2), Image.Resampling.BOX)), (picture.height, picture.width)

    def __call__(self, pictures: Any) -> list[Regions]:
        boxes = np.array([[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 0.5, 1]], np.float32)
        ones = np.ones(4, np.float32)
        return [Regions(size, pixels.reshape(4, 3).astype(np.float32), boxes, ones) for pixels, size in pictures]
