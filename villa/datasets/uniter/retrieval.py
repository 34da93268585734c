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
    """Texts with their images; a subclass chooses the pairs of an example.

    Arguments as for ``DatabaseSplit``.

    Attributes:
        image_of: image row of every text.
        texts_of: the texts of every image, by its row.
        distinct: rows of all images, in order of first occurrence.
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
        """Build an example of a text and its image."""
        return self.pairs(self.ids[index], [index], [self.image_of[index]])

    def region_counts(self, index: int) -> Sequence[int]:
        """Return nothing: which images are read is drawn, or they are kept for other texts."""
        return ()

    def text(self, index: int) -> Tensor:
        """Return a text's tokens ``[T]``."""
        return self.words(self.field(self.fields(index), "input_ids", index), index=index)

    def regions_of(self, images: Sequence[int]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the features ``[R, D]`` and boxes ``[R, 6]`` of images by row."""
        store: Any = self.pair.images
        features, boxes = zip(*map(store.__getitem__, images), strict=True)
        return features, boxes

    def pairs(self, name: str, texts: Sequence[int], images: Sequence[int]) -> Example:
        """Build an example of texts and images whose first pair matches."""
        features, boxes = self.regions_of(images)
        return Example(name, tuple(map(self.text, texts)), None, features, boxes, target=0)


class RandomNegatives(PairSplit):
    """A matching pair, its text with wrong images, and its image with wrong texts.

    Arguments as for ``DatabaseSplit``, and ``size``: number of wrong images, and of wrong texts, per example.
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
        """Build example ``index`` with negatives drawn from ``seed``."""
        image, draws = self.image_of[index], random.Random(seed)  # noqa: S311 - not for secrets
        texts = [index] * (1 + self.size) + self.wrong_texts(image, draws)
        images = [image, *self.wrong_images(image, draws), *[image] * self.size]
        return self.pairs(self.ids[index], texts, images)

    def wrong_images(self, image: int, draws: random.Random) -> list[int]:
        """Draw ``size`` distinct images other than ``image``."""
        drawn = draws.sample(self.distinct, self.size + 1)
        return [other for other in drawn if other != image][: self.size]

    def wrong_texts(self, image: int, draws: random.Random) -> list[int]:
        """Draw ``size`` distinct texts of other images."""
        own = self.texts_of[image]
        drawn = draws.sample(range(len(self.ids)), self.size + len(own))
        return [other for other in drawn if self.image_of[other] != image][: self.size]


class HardCandidates(RandomNegatives):
    """Candidates for hard negatives: example 2i is text i with images, 2i + 1 its image with texts."""

    def __len__(self) -> int:
        return 2 * len(self.ids)

    def draw(self, index: int, seed: int) -> Example:
        """Build example ``index`` with candidates drawn from ``seed``, the matching one first."""
        text, id = index // 2, self.ids[index // 2]
        image, draws = self.image_of[text], random.Random(seed)  # noqa: S311 - not for secrets
        if index % 2 == 0:
            return self.pairs(f"{id}:images", [text], [image, *self.wrong_images(image, draws)])
        return self.pairs(f"{id}:texts", [text, *self.wrong_texts(image, draws)], [image])

    def describe(self, index: int) -> str:
        """Describe the pair of an example."""
        return super().describe(index // 2)

    @property
    def lengths(self) -> Lengths:
        """Word-pieces and regions of each matching pair."""
        return np.repeat(self._lengths, 2)


class RetrievalEvaluation(PairSplit):
    """Every text with every image, in chunks of images: all texts with the first chunk, and so on.

    Images are sorted by their number of regions to reduce padding. Arguments as for ``DatabaseSplit``, and ``chunk``:
    images per example.
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
        """Describe the text of an example."""
        return super().describe(index % len(self.ids))

    @property
    def answered(self) -> bool:
        """Always True: every text has its image."""
        return True

    @property
    def sequential(self) -> bool:
        """Always True: the texts of a chunk share its images."""
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
        """Check that the options are consistent."""
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
    """Retrieval. Examples hold several pairs, the matching one first; evaluation scores all texts with all images."""

    Config: ClassVar[type[DatasetConfig]] = RetrievalConfig
    config: RetrievalConfig

    def parts(self, name: str, pair: Pair) -> list[Split]:
        """Return pairs with negatives for training, or all texts with all images."""
        rows = self.chosen(name, pair.text)
        if name != "train":
            return [RetrievalEvaluation(self, name, pair, rows, self.config.eval_images)]
        kind = HardCandidates if self.config.negatives == "hard" else RandomNegatives
        return [kind(self, name, pair, rows, self.config.negative_size)]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad examples into a batch.

        In evaluation, the last image of an example is repeated up to a common number; the reference names the real
        ones. Training candidates are not padded this way, because duplicates could be selected.

        Raises:
            DataError: a batch mixes candidate images and candidate texts.
        """
        if len({len(example.input_ids) for example in examples if example.input_ids is not None}) > 1:
            raise DataError("hard negatives are chosen for one example at a time; set batch.per_pass=1")
        if examples[0].reference is None:
            return super().collate(examples)
        most = max(len(example.reference.image_names) for example in examples)
        return super().collate([_filled(example, most) for example in examples])

    def refine(self, batch: Batch, score: Callable[[Batch], Tensor]) -> Batch:
        """Keep the matching pair and the highest-scoring wrong pairs."""
        if self.config.negatives != "hard":
            return batch
        scores = torch.cat([score(part) for part in _parts(batch, self.config.scored_at_once)], dim=1)
        hardest = scores[:, 1:].topk(self.config.hard_negatives, dim=1).indices + 1
        return _chosen(batch, torch.cat((torch.zeros_like(hardest[:, :1]), hardest), dim=1))

    def decode(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Return the best image, and all images with their scores."""
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
    """Repeat the last image up to ``count`` images."""
    assert isinstance(example.features, tuple)
    assert isinstance(example.boxes, tuple)
    more = count - len(example.features)
    features, boxes = ((*rows, *rows[-1:] * more) for rows in (example.features, example.boxes))
    return replace(example, features=features, boxes=boxes)


def _candidates(batch: Batch) -> tuple[str, ...]:
    """Return the names of the fields of ``batch`` with its candidates, images or texts."""
    assert batch.input_ids is not None
    images = ("features", "boxes", "region_mask")
    return images if batch.input_ids.shape[1] == 1 else ("input_ids", "attention_mask")


def _parts(batch: Batch, size: int) -> list[Batch]:
    """Split a batch into parts of at most ``size`` candidates."""
    split = {name: getattr(batch, name).split(size, dim=1) for name in _candidates(batch)}
    count = len(next(iter(split.values())))
    return [replace(batch, targets=None, **{name: parts[i] for name, parts in split.items()}) for i in range(count)]


def _chosen(batch: Batch, index: Tensor) -> Batch:
    """Return the batch with only the candidates ``index [B, S]``, without common padding."""
    rows = torch.arange(len(index), device=index.device).unsqueeze(1)
    fields = {name: getattr(batch, name)[rows, index] for name in _candidates(batch)}
    mask = fields["region_mask" if "region_mask" in fields else "attention_mask"]
    longest = int(mask.sum(-1).max())
    return replace(batch, **{name: value[:, :, :longest] for name, value in fields.items()})
