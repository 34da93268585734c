"""The interface of extractors of region features."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from villa.datasets.uniter.box_selection import BoxSelection
from villa.errors import ConfigError

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


@dataclass
class ExtractorConfig:
    """Options of every extractor.

    Attributes:
        background: background colour of transparent images: a name, or ``rgb(128,128,128)``.
    """

    background: str = "white"


@dataclass(frozen=True)
class Regions:
    """The regions of an image.

    Attributes:
        size: height and width of the image in pixels.
        features: ``[R, D]``.
        boxes: ``[R, 4]``: x1, y1, x2, y2 divided by the image's width and height.
        confidence: ``[R]`` in [0, 1], falling; 1 where nothing is detected.
        objects: classes ``[R]``, from 0 without the background, or None.
        attributes: attributes ``[R]``, from 0 without "none", or None.
        attribute_confidence: ``[R]``, or None.
        soft_labels: distributions of classes ``[R, C + 1]``, column 0 the background, or None.
    """

    size: tuple[int, int]
    features: Floats
    boxes: Floats
    confidence: Floats
    objects: Integers | None = None
    attributes: Integers | None = None
    attribute_confidence: Floats | None = None
    soft_labels: Floats | None = None

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays by name, as feature files have them."""
        named = {
            "features": self.features,
            "norm_bb": np.concatenate([self.boxes, self.boxes[:, 2:] - self.boxes[:, :2]], axis=1),
            "conf": self.confidence,
            "objects": self.objects,
            "attributes": self.attributes,
            "attribute_conf": self.attribute_confidence,
            "soft_labels": self.soft_labels,
        }
        return {name: array for name, array in named.items() if array is not None}


class Extractor(ABC):
    """Makes region features of images.

    Args:
        config: the options.
        device: where to compute.

    Attributes:
        Config: class of the options.
        selection: how many boxes an image has, which names the image database.
    """

    Config: ClassVar[type[ExtractorConfig]] = ExtractorConfig
    selection: BoxSelection

    def __init__(self, config: Any, device: torch.device) -> None:
        self.config, self.device = config, device

    @property
    @abstractmethod
    def signature(self) -> str:
        """Description of what features depend on: ``network version weights options``.

        The weights are 16 hexadecimal digits of a hash. Features with different signatures are not mixed.
        """

    @abstractmethod
    def read(self, picture: Image.Image) -> Any:
        """Prepare an upright RGB image for the network; called in several threads."""

    @abstractmethod
    def __call__(self, pictures: Sequence[Any]) -> list[Regions]:
        """Return the regions of what ``read`` returned. An image has the same ones in every batch."""


def hash_weights(network: nn.Module) -> str:
    """Return a hash of a network's parameters and buffers: 16 hexadecimal digits, the same for every file format."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(network.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe(network: str, weights: str, options: Mapping[str, Any]) -> str:
    """Return the signature of an extractor; see ``Extractor.signature``."""
    listed = " ".join(f"{name}={value}" for name, value in options.items())
    return f"{re.sub(r'[^!-~]', '_', network)} 1 {weights} {listed or 'as published'}"


_BOXES = re.compile(r"(?P<least>\d+)(?::(?P<most>\d+)(?::(?P<threshold>[01]?\.\d+|[01]))?)?")


def parse_boxes(text: str) -> BoxSelection:
    """Parse ``36`` (boxes of every image), ``10:100`` (between) or ``10:100:0.2`` (those that are surer, between).

    Raises:
        ConfigError: it is none of them.
    """
    found = _BOXES.fullmatch(text.strip())
    if found is None:
        raise ConfigError(
            f"boxes={text!r:.40}; give a number (36), bounds (10:100), or bounds and the confidence above which a box "
            "counts (10:100:0.2)"
        )
    least, most, threshold = int(found["least"]), found["most"], found["threshold"]
    if most is None:
        return BoxSelection(fixed=least)
    return BoxSelection(float(threshold or 0), int(most), least)
