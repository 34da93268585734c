"""What a store of region features owes the data sets that read from it."""

from __future__ import annotations

import hashlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from villa.errors import DataError


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
            found = self.path.stat()
        except (OSError, ValueError) as error:  # the latter for what can be no name, as one with a NUL
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{self.named_by}: cannot read '{self.path}' ({reason}); mend the path") from error
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
            raise DataError(f"{self.named_by}: cannot read '{self.path}' (it is {kind}, not a file); mend the path")
        return found


class Sources:
    """Distinct files in the order of their first mention.

    Attributes:
        files: one an entry.
    """

    def __init__(self) -> None:
        self.files: list[Source] = []
        self._places: dict[Path, int] = {}

    def add(self, source: Source) -> int:
        """Return the index of a file, after adding it if it is new."""
        place = self._places.setdefault(source.path, len(self.files))
        if place == len(self.files):
            self.files.append(source)
        return place


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
