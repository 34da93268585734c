"""Region features centred and scaled by their statistics over training images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from villa.datasets.stores.base import RegionStore
from villa.files import reading, regular_file

STATISTICS_FILE = "features.safetensors"
#: Training images that the statistics are taken over, at most.
SAMPLE = 512
#: Smallest scale, as a share of the mean one: a feature that hardly varies in the sample is not blown up.
SMALLEST_SCALE = 0.05


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
        with reading(f"cannot read '{folder / STATISTICS_FILE}'", "; use a checkpoint with its assets"):
            regular_file(folder / STATISTICS_FILE)
            tensors = load_file(folder / STATISTICS_FILE)
            return cls(tensors["mean"], tensors["scale"])

    def save(self, folder: Path) -> None:
        """Write ``features.safetensors`` into ``folder``."""
        save_file({"mean": self.mean, "scale": self.scale}, folder / STATISTICS_FILE)


class ScaledStore(RegionStore):
    """A store whose features are scaled as they are read.

    Args:
        store: the features as they are.
        scaling: their statistics.
    """

    def __init__(self, store: RegionStore, scaling: Scaling) -> None:
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
