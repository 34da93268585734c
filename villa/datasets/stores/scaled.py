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
from villa.errors import DataError, reading
from villa.files import regular_file

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
