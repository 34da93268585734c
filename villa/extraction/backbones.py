"""Grids of any vision backbone as extractors: EfficientNet-Lite0, those of transformers, and those of timm.

An image is resized whole to a square, without a crop, so that the cells cover it; every cell is a region.
"""

from __future__ import annotations

import inspect
import json
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from omegaconf import MISSING
from PIL import Image
from torch import Tensor

from villa.checkpoints.transformers_folder import find_config, load_pretrained
from villa.checkpoints.weight_files import read_weights, refuse_not_finite
from villa.datasets.own.grid import GridExtractor, GridOptions
from villa.datasets.uniter.box_selection import BoxSelection
from villa.errors import CheckpointError, ConfigError, reading
from villa.extraction.base import Extractor, ExtractorConfig, Regions, describe, hash_weights
from villa.registry import register_extractor
from villa.vetting import vetted_source

#: File of a processor's mean and standard deviation, and those of most backbones without one.
PROCESSOR, CENTRED = "preprocessor_config.json", ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass
class EfficientNetConfig(ExtractorConfig):
    """Options of the EfficientNet grid.

    Attributes:
        grid: cells a side.
        image_size: side in pixels that images are resized to, a multiple of 32 x ``grid``; None takes 32 x ``grid``.
    """

    grid: int = 4
    image_size: int | None = None


@dataclass
class BackboneConfig(ExtractorConfig):
    """Options of a backbone.

    Attributes:
        model: the backbone: a folder or name on the hub of transformers, or the name of a network of timm.
        weights: file of weights for a network of timm; None downloads the published ones.
        image_size: side in pixels that images are resized to; None takes the backbone's.
        grid: cells a side that the backbone's are averaged to; None keeps its own.
        whole: add the whole image as the first region: its class token, or the mean of the cells.
    """

    model: str = MISSING
    weights: str | None = None
    image_size: int | None = None
    grid: int | None = None
    whole: bool = False


@register_extractor("efficientnet_grid")
class EfficientNetGrid(Extractor):
    """A grid of EfficientNet-Lite0, trained on ImageNet: the regions of the quickstart and of one's own images."""

    Config = EfficientNetConfig

    def __init__(self, config: EfficientNetConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self._grid = GridExtractor(GridOptions(config.grid, config.image_size, config.background))
        self.selection = BoxSelection(fixed=self._grid.regions)
        self._boxes = self._grid.boxes().numpy()

    @property
    def signature(self) -> str:
        """Network, version of its package, weights and sizes."""
        return self._grid.signature

    def read(self, picture: Image.Image) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
        """Resize an image."""
        return self._grid.resize(picture).copy(), (picture.height, picture.width)

    def __call__(self, pictures: Sequence[Any]) -> list[Regions]:
        """Compute the cells, image by image."""
        found = (self._grid(self._network, pixels[None])[0].astype(np.float32) for pixels, _ in pictures)
        ones = np.ones(len(self._boxes), np.float32)
        return [Regions(size, cells, self._boxes, ones) for (_, size), cells in zip(pictures, found, strict=True)]

    @cached_property
    def _network(self) -> Any:
        return self._grid.load()


class Backbone(Extractor):
    """Base of the backbones: resizing, and the cells as regions.

    Subclasses call ``_settle`` once they have loaded their network.
    """

    Config = BackboneConfig
    _side: int
    _scale: tuple[Tensor, Tensor]

    def __init__(self, config: BackboneConfig, device: torch.device) -> None:
        super().__init__(config, device)
        for name in ("image_size", "grid"):
            if getattr(config, name) is not None and getattr(config, name) < 1:
                raise ConfigError(f"{name}={getattr(config, name)} is too small; give at least 1")

    @abstractmethod
    def _maps(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of cells ``[B, D, H, W]`` and of whole images ``[B, D]`` for ``[B, 3, S, S]``."""

    @property
    def signature(self) -> str:
        """Weights, and how images are read."""
        options = {"image": self._side, "grid": f"{self._shape[0]}x{self._shape[1]}"}
        return describe(self._name, self._weights, options | ({"whole": "true"} if self.config.whole else {}))

    def read(self, picture: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """Resize an image to a square, and scale its colours."""
        resized = picture.resize((self._side, self._side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
        return (pixels - self._scale[0]) / self._scale[1], (picture.height, picture.width)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Any]) -> list[Regions]:
        """Compute the cells; on the CPU image by image, for sums depend on the size of a batch."""
        pixels = torch.stack([one for one, _ in pictures])
        size = 1 if self.device.type == "cpu" else len(pixels)
        parts = [self._cells(part.to(self.device)) for part in torch.split(pixels, size)]
        features, ones = torch.cat(parts).float().cpu().numpy(), np.ones(len(self._boxes), np.float32)
        return [Regions(size, found, self._boxes, ones) for (_, size), found in zip(pictures, features, strict=True)]

    def _settle(self, network: Any, name: str, side: int, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take a network that images of ``side`` pixels are for, and try it on one."""
        self._network, self._name, self._side = network.eval().to(self.device), name, self.config.image_size or side
        self._scale = tuple(torch.tensor([*values], dtype=torch.float32).view(3, 1, 1) for values in (mean, std))  # type: ignore[assignment]
        self._weights = hash_weights(network)
        advice = "choose another image_size or grid, or another model"
        with reading(f"'{self.config.model}' gives no grid for images of {self._side} pixels", advice, ConfigError):
            with torch.inference_mode():
                maps, _ = self._maps(torch.zeros(1, 3, self._side, self._side, device=self.device))
            self._shape = (maps.shape[2], maps.shape[3])
            if self.config.grid is not None:
                if self.config.grid > min(self._shape):
                    raise ConfigError(
                        f"grid={self.config.grid} is finer than the {self._shape[0]} x {self._shape[1]} cells of "
                        f"'{self.config.model}' for images of {self._side} pixels; give a coarser one"
                    )
                self._shape = (self.config.grid, self.config.grid)
        self._boxes = _cells_of(*self._shape, whole=self.config.whole)
        self.selection = BoxSelection(fixed=len(self._boxes))

    def _cells(self, pixels: Tensor) -> Tensor:
        """Return regions ``[B, R, D]`` of images ``[B, 3, S, S]``."""
        maps, whole = self._maps(pixels)
        if maps.shape[2:] != self._shape:
            maps = F.adaptive_avg_pool2d(maps, self._shape)
        cells = maps.flatten(2).transpose(1, 2)
        return torch.cat([whole[:, None], cells], 1) if self.config.whole else cells


@register_extractor("transformers")
class TransformersGrid(Backbone):
    """Patches or cells of a vision backbone of transformers: CLIP, SigLIP, DINOv2, ViT, Swin, ConvNeXt, ..."""

    def __init__(self, config: BackboneConfig, device: torch.device) -> None:
        super().__init__(config, device)
        if config.weights is not None:
            raise ConfigError("extractor 'transformers' has its weights beside the model; leave out weights")
        from transformers import AutoModel

        described = find_config(config.model, {}, "model")
        loaded, _ = load_pretrained(AutoModel, config.model, described)
        self._tower = getattr(loaded, "vision_model", loaded)
        self._described = getattr(described, "vision_config", described)
        usual = getattr(self._described, "image_size", 224)
        self._usual = int(usual[0] if isinstance(usual, list | tuple) else usual)
        self._settle(self._tower, f"transformers/{self._described.model_type}", self._usual, *self._colours())

    def _maps(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        given: dict[str, Any] = {}
        if pixels.shape[-1] != self._usual and "interpolate_pos_encoding" in _arguments(self._tower):
            given["interpolate_pos_encoding"] = True
        last = self._tower(pixel_values=pixels, **given).last_hidden_state
        if last.dim() == 4:
            return last, last.mean((2, 3))
        height = width = self._cells_a_side(pixels.shape[-1], last.shape[1])
        before = last.shape[1] - height * width  # class token and registers
        cells = last[:, before:]
        return cells.transpose(1, 2).unflatten(2, (height, width)), last[:, 0] if before else cells.mean(1)

    def _cells_a_side(self, side: int, tokens: int) -> int:
        patch, extra = getattr(self._described, "patch_size", None), getattr(self._described, "num_register_tokens", 0)
        cells = side // patch if isinstance(patch, int) else 0
        if cells and 0 <= tokens - cells * cells <= 2 + (extra or 0):
            return cells
        if math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(f"its {tokens} tokens are no square of cells")
        return math.isqrt(tokens)

    def _colours(self) -> tuple[Sequence[float], Sequence[float]]:
        """Return mean and standard deviation of the model's own image processor."""
        with reading(f"the image processor of '{self.config.model}' cannot be read", "mend its files", CheckpointError):
            file = vetted_source(self.config.model, [PROCESSOR]) / PROCESSOR
            values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            mean, std = (
                values.get(f"image_{name}", usual) for name, usual in zip(("mean", "std"), CENTRED, strict=True)
            )
            return [float(one) for one in mean], [float(one) for one in std]


@register_extractor("timm")
class TimmGrid(Backbone):
    """Patches or cells of a network of timm (``pip install 'villa[timm]'``)."""

    def __init__(self, config: BackboneConfig, device: torch.device) -> None:
        super().__init__(config, device)
        with reading("extractor 'timm' needs timm", "pip install 'villa[timm]'", ConfigError):
            import timm
        with reading(f"timm cannot make '{config.model}'", "timm.list_models() has the names", ConfigError):
            network = timm.create_model(config.model, pretrained=config.weights is None, num_classes=0)
        if config.weights is not None:
            weights = read_weights(config.weights)
            refuse_not_finite(config.weights, weights.items())
            with reading(
                f"'{config.weights}' are not the weights of '{config.model}'", "give its own", CheckpointError
            ):
                lacking = network.load_state_dict(weights, strict=False).missing_keys
                if lacking:
                    raise CheckpointError(f"'{config.weights}' lacks '{lacking[0]}' of '{config.model}'; give its own")
        usual = network.pretrained_cfg
        mean, std = usual.get("mean", CENTRED[0]), usual.get("std", CENTRED[1])
        self._settle(network, f"timm/{config.model}", usual.get("input_size", (3, 224, 224))[-1], mean, std)

    def _maps(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        last = self._network.forward_features(pixels)
        if last.dim() == 4:
            if last.shape[1] != self._network.num_features:  # some have the features last
                last = last.permute(0, 3, 1, 2)
            return last, last.mean((2, 3))
        before = getattr(self._network, "num_prefix_tokens", 0)
        cells = last[:, before:]
        side = math.isqrt(cells.shape[1])
        return cells.transpose(1, 2).unflatten(2, (side, -1)), last[:, 0] if before else cells.mean(1)


def _cells_of(rows: int, columns: int, *, whole: bool) -> npt.NDArray[np.float32]:
    """Return the boxes of cells, row by row, perhaps after that of the whole image."""
    y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    sides = np.array([columns, rows] * 2)
    boxes = np.stack([x, y, x + 1, y + 1], -1).reshape(-1, 4) / sides
    return np.concatenate([np.array([[0, 0, 1, 1]]), boxes] if whole else [boxes]).astype(np.float32)


def _arguments(network: Any) -> Any:
    return inspect.signature(network.forward).parameters
