"""Grid features of a list of images, extracted once and read from the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from torch import Tensor

from villa.datasets.stores.base import RegionStore, Source
from villa.datasets.stores.cache import CHUNK, FeatureCache, cache_root
from villa.datasets.stores.grid import GridExtractor, GridOptions
from villa.engine.progress import track
from villa.errors import DataError
from villa.files import locked, no_space


class GridStore(RegionStore):
    """Grid features of images.

    The cache's name is a hash of every image's path, size and time of change and of what extracts the features,
    so that a changed image or option gives a new one. Extraction goes chunk by chunk, and only
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
        folder = cache_root(options.cache_dir) / "grid" / self._key()
        shape = (len(sources), self._extractor.regions, self.dim)
        description = {"extractor": self._extractor.signature, "boxes": self._boxes.tolist()}
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
        digest = hashlib.blake2b(self._extractor.signature.encode(), digest_size=16)
        for source in self.sources:
            stat = source.stat()
            digest.update(f"{source.path.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()
