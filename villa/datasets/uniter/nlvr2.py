"""NLVR2 on the released databases: is a sentence true of two images?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from villa.batch import Batch
from villa.datasets.base import DatasetConfig, Example, best_answers, grouped
from villa.datasets.ragged import Ragged
from villa.datasets.uniter.database_split import DatabaseSplit
from villa.datasets.uniter.databases import DatabaseConfig, DatabaseTask
from villa.errors import DataError
from villa.registry import register_dataset


class PairOfImagesSplit(DatabaseSplit):
    """Sentences about a left and a right image: two rows, each with the sentence and one image."""

    text_copies: ClassVar[int] = 2

    def example(self, index: int, fields: Mapping[str, Any]) -> Example:
        """Build an example with two rows."""
        images: Any = self.pair.images
        features, boxes = zip(*(images[row] for row in self.images[index]), strict=True)
        target = fields.get("target") if self.training or self.stores_answers else None
        if target not in (0, 1, None) or (target is None and (self.training or self.stores_answers)):
            raise self.unusable(index, f"the target {target!r:.40}; it must be 0 or 1")
        words = self.words(self.field(fields, "input_ids", index), index=index)
        target = None if target is None else int(target)
        return grouped(Example(self.ids[index], words, None, features, boxes, target), fields)

    def find_images(self) -> Ragged:
        """Check that every sentence has two existing images; return their rows."""
        images = self.pair.image_rows.take(self.rows)
        if not ((images.sizes == 2) & self.pair.lists_images(self.rows)).all():
            raise DataError(
                f"text database '{self.pair.text.path}' is not one of NLVR2: a text does not have two images"
            )
        return self.pair.images_of(self.rows)


@dataclass
class Nlvr2Config(DatabaseConfig):
    """Options of NLVR2: those that tasks on databases share."""

    name: str = "nlvr2"


@register_dataset("nlvr2")
class Nlvr2(DatabaseTask):
    """NLVR2: one sentence, a left and a right image."""

    Config: ClassVar[type[DatasetConfig]] = Nlvr2Config
    Examples = PairOfImagesSplit
    labels = ("False", "True")

    def rank(self, logits: Tensor) -> tuple[Tensor, Sequence[str]]:
        """Return the probabilities of both classes."""
        return logits.float().softmax(-1), self.labels

    def decode(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Return ``True`` or ``False`` with its probability."""
        return best_answers(*self.rank(logits))
