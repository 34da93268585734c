"""What a store of region features owes the data sets that read from it."""

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


@dataclass(frozen=True)
class Source:
    """A file that regions come from.

    Attributes:
        path: the image or feature file.
        named_by: where the user named it (``train.jsonl:3``), for messages.
    """

    path: Path
    named_by: str

    def stat(self) -> os.stat_result:
        """Return the file's size and times.

        Raises:
            DataError: there is no such file, or it is a folder, a pipe or a device, which might never end.
        """
        try:
            return regular_file(self.path)
        except (OSError, ValueError) as error:  # the latter for what can be no name, as one with a NUL
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{self.named_by}: cannot read '{self.path}' ({reason}); mend the path") from error


class SourceFiles(Sequence[Source]):
    """Files by number, in some 40 bytes each.

    Args:
        folder: that their names are relative to.
        names: of the files.
        mentions: for each, the number of what mentions it.
        where: gives the place (``train.jsonl:3``) of what mentions a file.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], mentions: Sequence[int], where: Callable[[int], str]
    ) -> None:
        self.folder, self._names, self._mentions, self._where = folder, names, mentions, where

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Source: ...

    @overload
    def __getitem__(self, index: slice) -> list[Source]: ...

    def __getitem__(self, index: int | slice) -> Source | list[Source]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self._source(self._names[index], self._mentions[index])

    def __iter__(self) -> Iterator[Source]:
        return map(self._source, self._names, self._mentions)

    def _source(self, name: str, mention: int) -> Source:
        return Source(self.folder / name, self._where(mention))


class Sources:
    """Collects distinct files in the order of their first mention.

    Args:
        folder: that their names are relative to.
        where: gives the place (``train.jsonl:3``) of what mentions a file, by its number.
    """

    def __init__(self, folder: Path, where: Callable[[int], str]) -> None:
        self.folder, self._where = folder, where
        self._places: dict[str, int] = {}
        self._mentions = array("q")

    def add(self, name: str, mention: int) -> int:
        """Return the index of a file, after adding it if it is new.

        Args:
            name: the file, as it was written.
            mention: the number of what mentions it.

        Raises:
            DataError: the name can be no path.
        """
        place = None if name.startswith("~") else self._places.get(name)
        if place is None:
            place = self._places.setdefault(self._plain(name, mention), len(self._places))
            if place == len(self._mentions):
                self._mentions.append(mention)
        return place

    def build(self) -> SourceFiles:
        """Return the files that were added."""
        from villa.datasets.uniter.index import Names  # takes long to import

        return SourceFiles(self.folder, Names.of(self._places), self._mentions[:], self._where)

    def _plain(self, name: str, mention: int) -> str:
        """Return the one name of a file that has several, as ``a`` and ``./a``."""
        if _PLAIN.fullmatch(name):  # much faster than making a path of it
            return name
        with about(self._where(mention)):
            path = self.folder / plain_path(name)
        return str(path.relative_to(self.folder) if path.is_relative_to(self.folder) else path)


class RegionStore(ABC):
    """Region features of a list of files, read by index; safe to use in forked and spawned workers.

    Args:
        sources: one file an entry.

    Attributes:
        dim: width D of a region feature.
    """

    dim: int

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return features ``[R, D]`` (float16 or float32) and normalised boxes ``[R, 4 | 6 | 7]`` float32."""

    @abstractmethod
    def regions(self, index: int) -> int:
        """Return the number of regions R of a file without reading its features."""

    @abstractmethod
    def prepare(self, indices: Iterable[int]) -> None:
        """Make sure that these entries can be read: may extract and cache features, with a progress bar."""

    def __len__(self) -> int:
        return len(self.sources)


def files_digest(sources: Iterable[Source]) -> str:
    """Hash the names and sizes of files: the same on every machine that holds the same data."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sources:
        digest.update(f"{source.path.name}\0{source.stat().st_size}\n".encode())
    return digest.hexdigest()


STATISTICS_FILE = "features.safetensors"
#: Training images that the statistics are taken over, at most.
SAMPLE = 512
#: Smallest scale, as a share of the mean one: a feature that hardly varies in the sample is not blown up.
SMALLEST_SCALE = 0.05


def scaled_reading(scaled: bool) -> dict[str, str]:
    """Return the fact of reading that region features are scaled, or are not."""
    return {"region features": "standardised" if scaled else "as they are"}


@dataclass(frozen=True)
class Scaling:
    """Mean and standard deviation of every dimension of a region feature, ``[D]`` float32."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, store: RegionStore, indices: Iterable[int]) -> Scaling:
        """Take the statistics over the regions of the first images of ``indices``; they must be prepared."""
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
    """A store whose features are scaled as they are read.

    Args:
        store: the features as they are.
        scaling: their statistics.

    Raises:
        DataError: the statistics are those of features of another width.
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
        """Make sure that these entries can be read."""
        self.store.prepare(indices)
