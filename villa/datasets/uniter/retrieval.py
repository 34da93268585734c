"""Image-text retrieval on the released databases (Flickr30k, COCO): rank the right pair above wrong ones."""

from __future__ import annotations

import random
from abc import ABC
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from villa.batch import Batch
from villa.config.variants import Overlay
from villa.datasets.base import DatasetConfig, Example, Split
from villa.datasets.ragged import Integers, Ragged
from villa.datasets.samplers import Lengths
from villa.datasets.synthetic.overlay import SMALL_RETRIEVAL
from villa.datasets.uniter.database_split import DatabaseSplit, Pair
from villa.datasets.uniter.databases import DatabaseConfig, DatabaseTask
from villa.datasets.uniter.image_lmdb import ImageStore
from villa.errors import ConfigError, DataError
from villa.facts import RetrievalReference
from villa.registry import register_dataset


class PairSplit(DatabaseSplit, ABC):
    """Texts with the images that they are about; a subclass says which pairs make an example.

    Args:
        task: the task.
        name: the split's name.
        pair: the databases.
        rows: which texts of the database they are.

    Attributes:
        image_of: row of the image of every text.
        texts_of: the texts of every image, by its row: more than one.
        distinct: rows of all images, in the order in which the texts name them.
    """

    def __init__(self, task: Retrieval, name: str, pair: Pair, rows: Integers) -> None:
        super().__init__(task, name, pair, rows)
        self.image_of: list[int] = self.images.values.tolist()
        texts: defaultdict[int, list[int]] = defaultdict(list)
        for text, image in enumerate(self.image_of):
            texts[image].append(text)
        self.texts_of = dict(texts)
        self.distinct = list(self.texts_of)

    def example(self, index: int, fields: Mapping[str, Any]) -> Example:
        """Make an example of a text and its own image."""
        return self.pairs(self.ids[index], [index], [self.image_of[index]])

    def text(self, index: int) -> Tensor:
        """Return a text's word-pieces ``[T]``."""
        return self.words(self.field(self.fields(index), "input_ids", index), index=index)

    def regions_of(self, images: Sequence[int]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the features ``[R, D]`` and boxes ``[R, 6]`` of images, given their rows."""
        store: Any = self.pair.images
        features, boxes = zip(*map(store.__getitem__, images), strict=True)
        return features, boxes

    def pairs(self, name: str, texts: Sequence[int], images: Sequence[int]) -> Example:
        """Make an example of these texts and images, whose first ones belong together."""
        features, boxes = self.regions_of(images)
        return Example(name, tuple(map(self.text, texts)), None, features, boxes, target=0)


class RandomNegatives(PairSplit):
    """A text and its image, the text with wrong images, and wrong texts with the image.

    Args:
        task: the task.
        name: the split's name.
        pair: the databases.
        rows: which texts of the database they are.
        size: wrong images, and as many wrong texts, an example.
    """

    def __init__(self, task: Retrieval, name: str, pair: Pair, rows: Integers, size: int) -> None:
        super().__init__(task, name, pair, rows)
        self.size = size
        others = (len(self.distinct) - 1, len(self.ids) - max(map(len, self.texts_of.values())))
        if min(others) < size:
            raise DataError(
                f"'{pair.text.path}' has {len(self.distinct)} images and {len(self.ids)} texts, too few for "
                f"dataset.negative_size={size} wrong ones; lower it to at most {min(others)}"
            )

    def __getitem__(self, index: int) -> Example:
        return self.draw(index, 0)

    def draw(self, index: int, seed: int) -> Example:
        """Return example ``index`` with negatives that derive from ``seed``."""
        image, draws = self.image_of[index], random.Random(seed)  # noqa: S311 - not for secrets
        texts = [index] * (1 + self.size) + self.wrong_texts(image, draws)
        images = [image, *self.wrong_images(image, draws), *[image] * self.size]
        return self.pairs(self.ids[index], texts, images)

    def wrong_images(self, image: int, draws: random.Random) -> list[int]:
        """Draw ``size`` different images that are not ``image``."""
        drawn = draws.sample(self.distinct, self.size + 1)
        return [other for other in drawn if other != image][: self.size]

    def wrong_texts(self, image: int, draws: random.Random) -> list[int]:
        """Draw ``size`` different texts that are not about ``image``."""
        own = self.texts_of[image]
        drawn = draws.sample(range(len(self.ids)), self.size + len(own))
        return [other for other in drawn if self.image_of[other] != image][: self.size]


class HardCandidates(RandomNegatives):
    """Candidates for hard negatives: example 2 i is text i with images, 2 i + 1 is its image with texts."""

    def __len__(self) -> int:
        return 2 * len(self.ids)

    def draw(self, index: int, seed: int) -> Example:
        """Return example ``index`` with candidates that derive from ``seed``, the right one first."""
        text, id = index // 2, self.ids[index // 2]
        image, draws = self.image_of[text], random.Random(seed)  # noqa: S311 - not for secrets
        if index % 2 == 0:
            return self.pairs(f"{id}:images", [text], [image, *self.wrong_images(image, draws)])
        return self.pairs(f"{id}:texts", [text, *self.wrong_texts(image, draws)], [image])

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
        rows: which texts of the database they are.
        chunk: images an example.
    """

    def __init__(self, task: Retrieval, name: str, pair: Pair, rows: Integers, chunk: int) -> None:
        super().__init__(task, name, pair, rows)
        counts = pair.counts(Ragged(np.array(self.distinct), np.arange(len(self.distinct) + 1)))
        self.distinct = [self.distinct[place] for place in np.argsort(counts, kind="stable").tolist()]
        self._column = {image: column for column, image in enumerate(self.distinct)}
        self._starts = range(0, len(self.distinct), chunk)
        self._chunk = chunk
        self._loaded: tuple[int, tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    def __len__(self) -> int:
        return len(self.ids) * len(self._starts)

    def __getitem__(self, index: int) -> Example:
        number, text = divmod(index, len(self.ids))
        id, first = self.ids[text], self._starts[number]
        images = self.distinct[first : first + self._chunk]
        features, boxes = self._regions(number, images)
        assert isinstance(self.pair.images, ImageStore)
        names = list(self.pair.images.names.take(np.array(images)))
        reference = RetrievalReference(
            text, first, self._column[self.image_of[text]], (len(self.ids), len(self.distinct)), id, names
        )
        return Example(f"{id}|{number}", (self.text(text),), None, features, boxes, None, reference)

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

    def _regions(self, number: int, images: Sequence[int]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Read a chunk of images once for all texts."""
        if self._loaded is None or self._loaded[0] != number:
            self._loaded = number, *self.regions_of(images)
        return self._loaded[1:]


@dataclass
class RetrievalConfig(DatabaseConfig):
    """Options of retrieval, besides those that tasks on databases share.

    Attributes:
        negatives: ``random`` wrong images and texts for every pair, or the ``hard`` ones: those of many candidates
            that the model itself finds best.
        negative_size: wrong images and as many wrong texts a pair (``random``), or candidates (``hard``).
        hard_negatives: wrong pairs that are kept of the candidates.
        scored_at_once: pairs that are scored at once in search of hard negatives.
        eval_images: images that are scored with a text at once in evaluation.
    """

    OVERLAYS: ClassVar[tuple[Overlay, ...]] = SMALL_RETRIEVAL

    name: str = "retrieval"
    negatives: Literal["random", "hard"] = "random"
    negative_size: int = 1
    hard_negatives: int = 31
    scored_at_once: int = 400
    eval_images: int = 400

    def check(self) -> None:
        """Refuse options that do not go together."""
        super().check()
        for name in ("negative_size", "hard_negatives", "scored_at_once", "eval_images"):
            if getattr(self, name) < 1:
                raise ConfigError(f"dataset.{name}={getattr(self, name)} is too small; give at least 1")
        if self.negatives == "hard" and self.hard_negatives > self.negative_size:
            raise ConfigError(
                f"dataset.hard_negatives={self.hard_negatives} cannot be chosen of negative_size={self.negative_size} "
                "candidates; raise negative_size"
            )


@register_dataset("retrieval")
class Retrieval(DatabaseTask):
    """Retrieval. Examples hold several pairs, the right one first; evaluation scores every text with every image."""

    Config: ClassVar[type[DatasetConfig]] = RetrievalConfig
    config: RetrievalConfig

    def parts(self, name: str, pair: Pair) -> list[Split]:
        """Pairs with negatives to train on, or all texts with all images."""
        rows = self.chosen(name, pair.text)
        if name != "train":
            return [RetrievalEvaluation(self, name, pair, rows, self.config.eval_images)]
        kind = HardCandidates if self.config.negatives == "hard" else RandomNegatives
        return [kind(self, name, pair, rows, self.config.negative_size)]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad examples into a batch.

        To evaluate, where examples have different numbers of images, the last image of an example is repeated: its
        reference names the real ones. Candidates are not padded so, for they would be chosen.

        Raises:
            DataError: candidate images and candidate texts are in one batch.
        """
        if len({len(example.input_ids) for example in examples if example.input_ids is not None}) > 1:
            raise DataError("hard negatives are chosen for one example at a time; set batch.per_pass=1")
        if examples[0].reference is None:
            return super().collate(examples)
        most = max(len(example.reference.image_names) for example in examples)
        return super().collate([_filled(example, most) for example in examples])

    def refine(self, batch: Batch, score: Callable[[Batch], Tensor]) -> Batch:
        """Keep the right pair and the wrong pairs that score best; see the base class."""
        if self.config.negatives != "hard":
            return batch
        scores = torch.cat([score(part) for part in _parts(batch, self.config.scored_at_once)], dim=1)
        hardest = scores[:, 1:].topk(self.config.hard_negatives, dim=1).indices + 1
        return _chosen(batch, torch.cat((torch.zeros_like(hardest[:, :1]), hardest), dim=1))

    def decode(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Return the best of the images scored, and all of them with their scores."""
        references: list[RetrievalReference] = batch.references or []
        decoded = []
        for reference, scores in zip(references, logits.float().sigmoid().tolist(), strict=True):
            names = list(reference.image_names)
            best = max(range(len(names)), key=scores.__getitem__)
            decoded.append(
                {
                    "answer": names[best],
                    "score": scores[best],
                    "text": reference.text_id,
                    "images": names,
                    "scores": scores[: len(names)],
                }
            )
        return decoded


def _filled(example: Example, count: int) -> Example:
    """Repeat the last image until there are ``count``."""
    assert isinstance(example.features, tuple)
    assert isinstance(example.boxes, tuple)
    more = count - len(example.features)
    features, boxes = ((*rows, *rows[-1:] * more) for rows in (example.features, example.boxes))
    return replace(example, features=features, boxes=boxes)


def _candidates(batch: Batch) -> tuple[str, ...]:
    """Names of the fields of ``batch`` that hold its candidates: those of its images, or of its texts."""
    assert batch.input_ids is not None
    images = ("features", "boxes", "region_mask")
    return images if batch.input_ids.shape[1] == 1 else ("input_ids", "attention_mask")


def _parts(batch: Batch, size: int) -> list[Batch]:
    """Cut a batch into parts of at most ``size`` candidates."""
    split = {name: getattr(batch, name).split(size, dim=1) for name in _candidates(batch)}
    count = len(next(iter(split.values())))
    return [replace(batch, targets=None, **{name: parts[i] for name, parts in split.items()}) for i in range(count)]


def _chosen(batch: Batch, index: Tensor) -> Batch:
    """Return the batch with the candidates ``index [B, S]`` alone, without padding that all of them have."""
    rows = torch.arange(len(index), device=index.device).unsqueeze(1)
    fields = {name: getattr(batch, name)[rows, index] for name in _candidates(batch)}
    mask = fields["region_mask" if "region_mask" in fields else "attention_mask"]
    longest = int(mask.sum(-1).max())
    return replace(batch, **{name: value[:, :, :longest] for name, value in fields.items()})
