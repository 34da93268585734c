"""The interface of stores of region features, their source files, and feature scaling."""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import overload

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from villa.errors import DataError, about, reading
from villa.files import plain_path, regular_file

#: Relative paths that ``plain_path`` and ``Path`` leave as they are.
_PLAIN = re.compile(r"[^/.~:\0][^/:\0]*(?:/[^/.:\0][^/:\0]*)*")

#: Files that are listed without an index.
_FEW = 10_000


@dataclass(frozen=True)
class ImageSource:
    """An image or feature file.

    Attributes:
        path: the file.
        named_by: where the user named it (``train.jsonl:3``), for messages; empty on the command line.
    """

    path: Path
    named_by: str

    @property
    def place(self) -> str:
        """Beginning of a message: ``"train.jsonl:3: "``."""
        return f"{self.named_by}: " if self.named_by else ""

    def stat(self) -> os.stat_result:
        """Return the file's size and times.

        Raises:
            DataError: there is no such file, or it is a folder, a pipe or a device.
        """
        try:
            return regular_file(self.path)
        except (OSError, ValueError) as error:  # ValueError: no possible path, such as one with a NUL
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{self.place}cannot read '{self.path}' ({reason}); mend the path") from error


class SourceFiles(Sequence[ImageSource]):
    """A sequence of source files; of many, at some 40 bytes each.

    Args:
        folder: folder that the names are relative to.
        names: names of the files.
        mentions: number of the record that first names each file.
        where: returns the place (``train.jsonl:3``) of a record.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], mentions: Sequence[int], where: Callable[[int], str]
    ) -> None:
        self.folder, self._names, self._mentions, self._where = folder, names, mentions, where

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> ImageSource: ...

    @overload
    def __getitem__(self, index: slice) -> list[ImageSource]: ...

    def __getitem__(self, index: int | slice) -> ImageSource | list[ImageSource]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self._source(self._names[index], self._mentions[index])

    def __iter__(self) -> Iterator[ImageSource]:
        return map(self._source, self._names, self._mentions)

    def _source(self, name: str, mention: int) -> ImageSource:
        return ImageSource(self.folder / name, self._where(mention))


class Sources:
    """Collects distinct files in the order of their first mention.

    Args:
        folder: folder that their names are relative to.
        where: returns the place (``train.jsonl:3``) of a record.
    """

    def __init__(self, folder: Path, where: Callable[[int], str]) -> None:
        self.folder, self._where = folder, where
        self._places: dict[str, int] = {}
        self._mentions = array("q")

    def add(self, name: str, mention: int) -> int:
        """Return the index of a file, adding it if it is new.

        Args:
            name: the file as the record names it.
            mention: number of the record.

        Raises:
            DataError: the name is no possible path.
        """
        place = None if name.startswith("~") else self._places.get(name)
        if place is None:
            place = self._places.setdefault(self._plain(name, mention), len(self._places))
            if place == len(self._mentions):
                self._mentions.append(mention)
        return place

    def build(self) -> SourceFiles:
        """Return the collected files."""
        names: Sequence[str] = list(self._places)
        if len(names) > _FEW:
            from villa.datasets.uniter.index import Names  # slow to import

            names = Names.of(names)
        return SourceFiles(self.folder, names, self._mentions[:], self._where)

    def _plain(self, name: str, mention: int) -> str:
        """Normalise a name: ``./a`` to ``a``."""
        if _PLAIN.fullmatch(name):  # much faster than constructing a path
            return name
        with about(self._where(mention)):
            path = self.folder / plain_path(name)
        return str(path.relative_to(self.folder) if path.is_relative_to(self.folder) else path)


class RegionStore(ABC):
    """Region features of a list of files, read by index; safe to use in forked and spawned workers.

    Args:
        sources: the files.

    Attributes:
        dim: width D of the region features.
        extractor: signature of what made them; None if it is not known.
    """

    dim: int
    extractor: str | None = None

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self.sources = sources

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return features ``[R, D]`` (float16 or float32) and normalised boxes ``[R, 4 | 6 | 7]`` float32."""

    @abstractmethod
    def regions(self, index: int) -> int:
        """Return the number of regions R of a file without reading its features."""

    @abstractmethod
    def prepare(self, indices: Iterable[int]) -> None:
        """Make entries readable: check them, or extract and cache their features with a progress bar."""

    def __len__(self) -> int:
        return len(self.sources)


def files_digest(sources: Iterable[ImageSource]) -> str:
    """Return a hash of the names and sizes of files, the same on every machine with the same data."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sources:
        digest.update(f"{source.path.name}\0{source.stat().st_size}\n".encode())
    return digest.hexdigest()


STATISTICS_FILE = "features.safetensors"
#: Maximum number of training images that the statistics are computed from.
SAMPLE = 512
#: Smallest scale relative to the mean scale, so that features that hardly vary in the sample are not amplified.
SMALLEST_SCALE = 0.05


def scaled_reading(scaled: bool) -> dict[str, str]:
    """Return, for ``DataFacts.reading``, whether region features are scaled."""
    return {"region features": "standardised" if scaled else "as they are"}


@dataclass(frozen=True)
class Scaling:
    """Mean and standard deviation of every feature dimension, ``[D]`` float32."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, store: RegionStore, indices: Iterable[int]) -> Scaling:
        """Compute the statistics over the regions of the first images of ``indices``, which must be prepared."""
        features = torch.cat([store[index][0].float() for index in islice(indices, SAMPLE)])
        deviation = features.std(0, correction=0)
        return cls(features.mean(0), deviation.clamp_min(SMALLEST_SCALE * float(deviation.mean())).clamp_min(1e-6))

    @classmethod
    def load(cls, folder: Path) -> Scaling:
        """Read what ``save`` wrote.

        Raises:
            DataError: the file is missing or damaged.
        """
        path = folder / STATISTICS_FILE
        with reading(f"cannot read '{path}'", "use a checkpoint with its assets"):
            regular_file(path)
            tensors = load_file(path)
            mean, scale = tensors["mean"], tensors["scale"]
            if mean.dim() != 1 or mean.shape != scale.shape or {mean.dtype, scale.dtype} != {torch.float32}:
                raise ValueError("mean and scale are no float32 vectors of one length")
            if not (mean.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
                raise ValueError("mean or scale has values that no statistics have")
            return cls(mean, scale)

    def save(self, folder: Path) -> None:
        """Write ``features.safetensors`` into ``folder``."""
        save_file({"mean": self.mean, "scale": self.scale}, folder / STATISTICS_FILE)


class ScaledStore(RegionStore):
    """A store that standardises the features of another as they are read.

    Args:
        store: the original features.
        scaling: their statistics.

    Raises:
        DataError: the statistics are of features of another width.
    """

    def __init__(self, store: RegionStore, scaling: Scaling) -> None:
        if len(scaling.mean) != store.dim:
            raise DataError(
                f"features are {store.dim} wide, their mean and scale ({STATISTICS_FILE}) {len(scaling.mean)}; use the "
                "features that the model was trained on"
            )
        super().__init__(store.sources)
        self.store, self.scaling, self.dim = store, scaling, store.dim

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        features, boxes = self.store[index]
        return (features.float() - self.scaling.mean) / self.scaling.scale, boxes

    def regions(self, index: int) -> int:
        """Return the number of regions of a file."""
        return self.store.regions(index)

    def prepare(self, indices: Iterable[int]) -> None:
        """Prepare entries of the original store."""
        self.store.prepare(indices)
        self.extractor = self.store.extractor
