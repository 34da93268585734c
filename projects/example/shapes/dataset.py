"""A made-up task: is the word for a shape (token 3 or 4) the shape that the region features show?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from villa.batch import Batch
from villa.datasets.base import DatasetConfig, Example, Split, TaskDataset
from villa.datasets.collation import collate
from villa.models.base import DataFacts
from villa.registry import register_dataset


@dataclass
class ShapesConfig(DatasetConfig):
    """Options: examples a split, and the width of a region feature."""

    examples: int = 256
    feature_dim: int = 8


class ShapesSplit(Split):
    """Examples are drawn from their index, so nothing is stored."""

    def __init__(self, config: ShapesConfig, offset: int) -> None:
        self.config, self.offset = config, offset

    def __len__(self) -> int:
        return self.config.examples

    @property
    def lengths(self) -> Sequence[int]:
        """Three tokens and two regions each."""
        return [5] * len(self)

    def __getitem__(self, index: int) -> Example:
        """Draw example ``index``: label 1 when the word and the features agree."""
        draw = torch.Generator().manual_seed(self.offset + index)
        word, shown = torch.randint(0, 2, (2,), generator=draw).tolist()
        features = torch.randn(2, self.config.feature_dim, generator=draw) + (4 * shown - 2)
        return Example(
            id=str(index),
            input_ids=torch.tensor([1, 3 + word, 2]),
            features=features,
            boxes=torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]]),
            target=int(word == shown),
        )


@register_dataset("shapes")
class Shapes(TaskDataset):
    """The made-up task."""

    Config = ShapesConfig

    def split(self, name: str) -> Split:
        """Return split ``name``; every split draws other examples."""
        return ShapesSplit(self.config, {"train": 0, "val": 10**6, "test": 2 * 10**6}[name])

    def facts(self) -> DataFacts:
        """Five word pieces, two labels."""
        return DataFacts(vocab_size=5, num_labels=2, feature_dim=self.config.feature_dim)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad examples into a batch."""
        return collate(examples)

    def save_assets(self, folder: Path) -> None:
        """Save nothing: there is no vocabulary."""

    def fingerprint(self) -> str:
        """Name the data by its options."""
        return f"shapes-{self.config.examples}-{self.config.feature_dim}"
