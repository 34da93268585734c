"""Splits of image-text retrieval: pairs with negatives to train on, and all pairs to evaluate."""

from __future__ import annotations

import random
from abc import ABC
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from villa.datasets.base import Example
from villa.datasets.database_split import DatabaseSplit, Pair
from villa.datasets.samplers import Lengths
from villa.errors import DataError
from villa.evaluation.references import RetrievalReference

if TYPE_CHECKING:
    from villa.datasets.retrieval import Retrieval


class PairSplit(DatabaseSplit, ABC):
    """Texts with the images that they are about; a subclass says which pairs make an example.

    Args:
        task: the task.
        name: the split's name.
        pair: the databases.
        lengths: text length of every text by id.

    Attributes:
        image_of: the image of every text.
        texts_of: the texts of every image, which are more than one.
        images: all images.
    """

    def __init__(self, task: Retrieval, name: str, pair: Pair, lengths: Mapping[str, int]) -> None:
        super().__init__(task, name, pair, lengths)
        self.image_of = dict(zip(self.ids, map(str, self.named()), strict=True))
        texts: defaultdict[str, list[str]] = defaultdict(list)
        for id, image in self.image_of.items():
            texts[image].append(id)
        self.texts_of = dict(texts)
        self.images = list(self.texts_of)

    def example(self, id: str, fields: Mapping[str, Any]) -> Example:
        """Make an example of a text and its own image."""
        return self.pairs(id, [id], [self.image_of[id]])

    def text(self, id: str) -> Tensor:
        """Return a text's word-pieces ``[T]``."""
        return self.words(self.field(self.pair.text[id], "input_ids", id), id=id)

    def image(self, name: str) -> tuple[Tensor, Tensor]:
        """Return an image's features ``[R, D]`` and boxes ``[R, 6]``."""
        features, boxes = self.pair.images[name]
        return features, boxes

    def pairs(self, id: str, texts: Sequence[str], images: Sequence[str]) -> Example:
        """Make an example of these texts and images, whose first ones belong together."""
        features, boxes = zip(*map(self.image, images), strict=True)
        return Example(id, tuple(map(self.text, texts)), None, features, boxes, target=0)


class RandomNegatives(PairSplit):
    """A text and its image, the text with wrong images, and wrong texts with the image.

    Args:
        task: the task.
        name: the split's name.
        pair: the databases.
        lengths: text length of every text by id.
        size: wrong images, and as many wrong texts, an example.
    """

    def __init__(self, task: Retrieval, name: str, pair: Pair, lengths: Mapping[str, int], size: int) -> None:
        super().__init__(task, name, pair, lengths)
        self.size = size
        others = (len(self.images) - 1, len(self.ids) - max(map(len, self.texts_of.values())))
        if min(others) < size:
            raise DataError(
                f"'{pair.text.path}' has {len(self.images)} images and {len(self.ids)} texts, too few for "
                f"dataset.negative_size={size} wrong ones; lower it to at most {min(others)}"
            )

    def __getitem__(self, index: int) -> Example:
        return self.draw(index, 0)

    def draw(self, index: int, seed: int) -> Example:
        """Return example ``index`` with negatives that derive from ``seed``."""
        id = self.ids[index]
        image, draws = self.image_of[id], random.Random(seed)  # noqa: S311 - not for secrets
        texts = [id] * (1 + self.size) + self.wrong_texts(image, draws)
        images = [image, *self.wrong_images(image, draws), *[image] * self.size]
        return self.pairs(id, texts, images)

    def wrong_images(self, image: str, draws: random.Random) -> list[str]:
        """Draw ``size`` different images that are not ``image``."""
        drawn = draws.sample(self.images, self.size + 1)
        return [other for other in drawn if other != image][: self.size]

    def wrong_texts(self, image: str, draws: random.Random) -> list[str]:
        """Draw ``size`` different texts that are not about ``image``."""
        own = self.texts_of[image]
        drawn = draws.sample(self.ids, self.size + len(own))
        return [other for other in drawn if self.image_of[other] != image][: self.size]


class HardCandidates(RandomNegatives):
    """Candidates for hard negatives: example 2 i is text i with images, 2 i + 1 is its image with texts."""

    def __len__(self) -> int:
        return 2 * len(self.ids)

    def draw(self, index: int, seed: int) -> Example:
        """Return example ``index`` with candidates that derive from ``seed``, the right one first."""
        id = self.ids[index // 2]
        image, draws = self.image_of[id], random.Random(seed)  # noqa: S311 - not for secrets
        if index % 2 == 0:
            return self.pairs(f"{id}:images", [id], [image, *self.wrong_images(image, draws)])
        return self.pairs(f"{id}:texts", [id, *self.wrong_texts(image, draws)], [image])

    def describe(self, index: int) -> str:
        """See the base class."""
        return super().describe(index // 2)

    @property
    def lengths(self) -> Lengths:
        """Word-pieces and regions of the right pair."""
        return np.repeat(self._lengths, 2)


class RetrievalEvaluation(PairSplit):
    """Every text with every image, ``chunk`` images at a time: all texts with the first images, and so on.

    Images are ordered by their number of regions, so that those scored together need little padding.

    Args:
        task: the task.
        name: the split's name.
        pair: the databases.
        lengths: text length of every text by id.
        chunk: images an example.
    """

    def __init__(self, task: Retrieval, name: str, pair: Pair, lengths: Mapping[str, int], chunk: int) -> None:
        super().__init__(task, name, pair, lengths)
        self.images.sort(key=pair.count)
        self._column = {image: column for column, image in enumerate(self.images)}
        self._starts = range(0, len(self.images), chunk)
        self._chunk = chunk
        self._loaded: tuple[int, tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    def __len__(self) -> int:
        return len(self.ids) * len(self._starts)

    def __getitem__(self, index: int) -> Example:
        number, text = divmod(index, len(self.ids))
        id, first = self.ids[text], self._starts[number]
        names = self.images[first : first + self._chunk]
        features, boxes = self._regions(number, names)
        reference = RetrievalReference(
            text, first, self._column[self.image_of[id]], (len(self.ids), len(self.images)), id, names
        )
        return Example(f"{id}|{number}", (self.text(id),), None, features, boxes, None, reference)

    def describe(self, index: int) -> str:
        """See the base class."""
        return super().describe(index % len(self.ids))

    @property
    def answered(self) -> bool:
        """Every text has its image."""
        return True

    @property
    def lengths(self) -> Lengths:
        """Word-pieces and regions of each text with its own image."""
        return np.tile(self._lengths, len(self._starts))

    def _regions(self, number: int, names: Sequence[str]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Read a chunk of images once for all texts."""
        if self._loaded is None or self._loaded[0] != number:
            features, boxes = zip(*map(self.image, names), strict=True)
            self._loaded = number, features, boxes
        return self._loaded[1:]
