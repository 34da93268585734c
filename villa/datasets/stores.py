"""The interface of stores of region features, their source files, and feature scaling."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_left
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
#: Pieces of files that are known again: the questions about an image mostly follow each other.
KEPT_PIECES = 4096


@dataclass(frozen=True)
class Piece:
    """The bytes of an image within a file, such as an archive.

    Attributes:
        path: the file.
        start: offset of the first byte.
        size: number of bytes.
    """

    path: Path
    start: int
    size: int


@dataclass(frozen=True)
class ImageSource:
    """An image or feature file.

    Attributes:
        path: the file, or the one that holds it.
        named_by: where the user named it (``train.jsonl:3``), for messages; empty on the command line.
        start: offset of its first byte in the file that holds it.
        size: number of its bytes there; None if the file is the image.
    """

    path: Path
    named_by: str
    start: int = 0
    size: int | None = None

    @property
    def place(self) -> str:
        """Beginning of a message: ``"train.jsonl:3: "``."""
        return f"{self.named_by}: " if self.named_by else ""

    @property
    def name(self) -> str:
        """The path; of a piece of a file, with the offset."""
        return str(self.path) if self.size is None else f"{self.path}@{self.start}"

    def content(self) -> bytes:
        """Read a piece of a file.

        Raises:
            OSError: the file cannot be read, or is shorter.
        """
        assert self.size is not None
        with self.path.open("rb", buffering=0) as file:
            found = os.pread(file.fileno(), self.size, self.start)
        if len(found) < self.size:
            raise OSError(errno.EIO, "the file that holds it is cut off", str(self.path))
        return found

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


class Pieces:
    """Pieces of files among other sources, at some 32 bytes each.

    Attributes:
        numbers: number of each among all sources, ascending.
    """

    def __init__(self) -> None:
        self.numbers = array("q")
        self._owners, self._bounds = array("i"), array("q")
        self._paths: dict[Path, int] = {}
        self._files: list[Path] = []

    def add(self, piece: Piece, number: int) -> None:
        """Add a piece as source ``number``."""
        owner = self._paths.setdefault(piece.path, len(self._paths))
        if owner == len(self._files):
            self._files.append(piece.path)
        self.numbers.append(number)
        self._owners.append(owner)
        self._bounds.extend((piece.start, piece.size))

    def __getitem__(self, place: int) -> Piece:
        return Piece(self._files[self._owners[place]], *self._bounds[2 * place : 2 * place + 2])


class SourceFiles(Sequence[ImageSource]):
    """A sequence of source files; of many, at some 40 bytes each.

    Args:
        folder: folder that the names are relative to.
        names: names of the files.
        mentions: number of the record that first names each file or piece.
        where: returns the place (``train.jsonl:3``) of a record.
        pieces: the sources that are pieces of files, between those that are files.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        mentions: Sequence[int],
        where: Callable[[int], str],
        pieces: Pieces | None = None,
    ) -> None:
        self.folder, self._names, self._mentions, self._where = folder, names, mentions, where
        self._pieces = pieces or Pieces()

    def __len__(self) -> int:
        return len(self._mentions)

    @overload
    def __getitem__(self, index: int) -> ImageSource: ...

    @overload
    def __getitem__(self, index: slice) -> list[ImageSource]: ...

    def __getitem__(self, index: int | slice) -> ImageSource | list[ImageSource]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        number, numbers = range(len(self))[index], self._pieces.numbers
        place, named_by = bisect_left(numbers, number), self._where(self._mentions[number])
        if place == len(numbers) or numbers[place] != number:
            return ImageSource(self.folder / self._names[number - place], named_by)
        piece = self._pieces[place]
        return ImageSource(piece.path, named_by, piece.start, piece.size)

    def __iter__(self) -> Iterator[ImageSource]:
        if self._pieces.numbers:
            return (self[number] for number in range(len(self)))
        return map(self._source, self._names, self._mentions)

    def _source(self, name: str, mention: int) -> ImageSource:
        return ImageSource(self.folder / name, self._where(mention))


class Sources:
    """Collects distinct files in the order of their first mention, and pieces of files.

    Args:
        folder: folder that their names are relative to.
        where: returns the place (``train.jsonl:3``) of a record.
    """

    def __init__(self, folder: Path, where: Callable[[int], str]) -> None:
        self.folder, self._where = folder, where
        self._places: dict[str, int] = {}
        self._mentions = array("q")
        self._pieces = Pieces()
        self._recent: dict[Piece, int] = {}

    def add(self, name: str | Piece, mention: int) -> int:
        """Return the index of a file, adding it if it is new.

        Args:
            name: the file as the record names it. A piece is known again among the last ones only.
            mention: number of the record.

        Raises:
            DataError: the name is no possible path.
        """
        if isinstance(name, Piece):
            return self._add_piece(name, mention)
        place = None if name.startswith("~") else self._places.get(name)
        if place is None:
            place = self._places.setdefault(self._plain(name, mention), len(self._mentions))
            if place == len(self._mentions):
                self._mentions.append(mention)
        return place

    def build(self) -> SourceFiles:
        """Return the collected files."""
        names: Sequence[str] = list(self._places)
        if len(names) > _FEW:
            from villa.datasets.uniter.index import Names  # slow to import

            names = Names.of(names)
        return SourceFiles(self.folder, names, self._mentions[:], self._where, self._pieces)

    def _add_piece(self, piece: Piece, mention: int) -> int:
        place = self._recent.get(piece)
        if place is None:
            place = self._recent[piece] = len(self._mentions)
            self._mentions.append(mention)
            self._pieces.add(piece, place)
            if len(self._recent) > KEPT_PIECES:
                del self._recent[next(iter(self._recent))]
        return place

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
        size = source.stat().st_size if source.size is None else source.size
        digest.update(f"{source.path.name}\0{size}\n".encode())
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
