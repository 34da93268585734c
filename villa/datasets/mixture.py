"""Data that are a mixture: several parts, of which every update of training takes one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from villa.config.schema import BatchConfig
from villa.datasets.base import Example, Split
from villa.datasets.database_split import ConcatenatedSplit
from villa.datasets.samplers import MixedSampler, Sampler, Share


@dataclass(frozen=True)
class Part:
    """A part of a mixture.

    Attributes:
        name: unique within the mixture.
        label: what its updates are logged under: parts may share one.
        weight: how often an update is of this part, relative to the others.
        split: its examples.
    """

    name: str
    label: str
    weight: float
    split: Split


class Mixture(ConcatenatedSplit):
    """Parts whose examples never share a batch; to evaluate, they come one after another.

    Args:
        mixed: at least one part.
    """

    def __init__(self, mixed: Sequence[Part]) -> None:
        super().__init__([part.split for part in mixed])
        self.mixed = list(mixed)

    def __getitem__(self, index: int) -> Example:
        """The same example may be in several parts: ids begin with the part's name."""
        split, within = self._place(index)
        example = split[within]
        name = next(part.name for part in self.mixed if part.split is split)
        return replace(example, id=f"{name}:{example.id}")

    def sampler(self, batch: BatchConfig, seed: int) -> Sampler:
        """Draw a part for every update, by weight."""
        shares = [Share(part.name, part.label, part.weight, part.split.lengths) for part in self.mixed]
        return MixedSampler(shares, batch, seed)

    def cut(self, examples: int) -> list[list[Sequence[int]]]:
        """Cut every part on its own."""
        ends = [0, *self._ends.tolist()]
        return [
            [range(at, min(at + examples, end)) for at in range(start, end, examples)] for start, end in pairwise(ends)
        ]
