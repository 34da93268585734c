"""Pre-training splits: texts with their images as examples of one objective."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from villa.batch import Batch
from villa.config.schema import BatchConfig
from villa.datasets.base import Example, Split
from villa.datasets.collation import collate
from villa.datasets.ragged import Integers
from villa.datasets.samplers import MixedSampler, MixtureShare, Sampler
from villa.datasets.uniter.database_split import ConcatenatedSplit, DatabaseSplit, Pair
from villa.datasets.uniter.databases import DatabaseTask
from villa.datasets.uniter.image_lmdb import PairedImageStore
from villa.datasets.uniter.index import in_order
from villa.datasets.uniter.vcr import ANSWER, QUESTION, RATIONALE, Choices
from villa.errors import DataError
from villa.objectives import OBJECTIVES
from villa.rng import derive_seed


@dataclass(frozen=True)
class ObjectiveExample(Example):
    """An example of one text and one image for an objective.

    Attributes:
        objective: name of the objective.
        masked_tokens: ``[T]`` bool, or None.
        masked_regions: ``[R]`` bool, or None; masked regions have zero features.
        rows: targets, a row per masked token or region: ``[N]`` int64 or ``[M, ...]``; or None.
    """

    objective: str = ""
    masked_tokens: Tensor | None = None
    masked_regions: Tensor | None = None
    rows: Tensor | None = None


def collate_objective(examples: Sequence[ObjectiveExample]) -> Batch:
    """Pad examples of one objective into a batch and concatenate their target rows.

    Raises:
        DataError: the examples have different objectives.
    """
    names = list(dict.fromkeys(example.objective for example in examples))
    if len(names) > 1:
        raise DataError(f"a batch mixes the objectives {' and '.join(names)}; keep them apart")
    batch = replace(
        collate(examples),
        objective=names[0],
        masked_tokens=_padded([example.masked_tokens for example in examples]),
        masked_regions=_padded([example.masked_regions for example in examples]),
    )
    rows = [example.rows for example in examples if example.rows is not None]
    if not rows:
        return batch
    targets = torch.cat(rows)
    return replace(batch, targets=targets.float() if targets.is_floating_point() else targets)


def _padded(masks: Sequence[Tensor | None]) -> Tensor | None:
    present = [mask for mask in masks if mask is not None]
    return pad_sequence(present, batch_first=True) if present else None


#: Default share of masked tokens or regions.
PROBABILITY = 0.15
#: Cumulative shares of masked tokens that become [MASK], or a random token; the rest is unchanged.
_MASK, _CHANGED = 0.8, 0.9


def mask_words(
    words: Sequence[int],
    mask_id: int,
    vocabulary: tuple[int, int],
    draws: random.Random,
    probability: float = PROBABILITY,
) -> tuple[list[int], list[bool]]:
    """Mask each token independently; if none was drawn, the first one becomes [MASK].

    Args:
        words: tokens without [CLS] and [SEP], which are never masked.
        mask_id: id of [MASK].
        vocabulary: first id and end of the range of random tokens.
        draws: the generator.
        probability: share of masked tokens.

    Returns:
        The input tokens, and for each whether it is to be predicted (also if unchanged).
    """
    read, asked = list(words), [False] * len(words)
    for place in range(len(words)):
        drawn = draws.random()
        if drawn >= probability:
            continue
        asked[place] = True
        if drawn < _MASK * probability:
            read[place] = mask_id
        elif drawn < _CHANGED * probability:
            read[place] = draws.choice(range(*vocabulary))
    if words and not any(asked):
        read[0], asked[0] = mask_id, True
    return read, asked


def mask_regions(count: int, draws: random.Random, probability: float = PROBABILITY) -> list[bool]:
    """Mask each of ``count`` regions independently; if none was drawn, mask a random one."""
    masked = [draws.random() < probability for _ in range(count)]
    if count and not any(masked):
        masked[draws.choice(range(count))] = True
    return masked


def wrong_image(images: Sequence[int] | npt.NDArray[np.integer[Any]], right: int, draws: random.Random) -> int:
    """Draw an image other than ``right`` from distinct images, at least two."""
    while (drawn := int(images[draws.sample(range(len(images)), 1)[0]])) == right:
        pass
    return drawn


@dataclass(frozen=True)
class ObjectiveSettings:
    """Settings of an objective.

    Attributes:
        objective: name of the objective.
        mask_probability: share of masked tokens or regions.
        negative_probability: share of pairs that do not match.
    """

    objective: str
    mask_probability: float = 0.15
    negative_probability: float = 0.5


class Words(NamedTuple):
    """A text without [CLS] and [SEP].

    Attributes:
        parts: tokens of its parts, to be separated by [SEP].
        types: token type of each part, or None if all are 0.
    """

    parts: Sequence[Sequence[int]]
    types: tuple[int, ...] | None = None


class ObjectiveSplit(DatabaseSplit):
    """Texts and images for one objective. Training draws new masks and wrong images in every epoch.

    Several splits may share a pair of databases. Arguments as for ``DatabaseSplit``, and ``settings`` of the objective.

    Raises:
        DataError: the objective matches pairs, but there is only one image.
    """

    def __init__(self, task: DatabaseTask, name: str, pair: Pair, rows: Integers, settings: ObjectiveSettings) -> None:
        super().__init__(task, name, pair, rows)
        self.settings = settings
        rows = self.images.values
        self.distinct = rows[:0] if isinstance(pair.images, PairedImageStore) else in_order(rows, len(pair.images))
        self._check()

    def asking(self, settings: ObjectiveSettings) -> ObjectiveSplit:
        """Return the same texts for another objective, sharing what was read.

        Raises:
            DataError: as for a new split.
        """
        other = copy.copy(self)
        other.settings = settings
        other._check()
        return other

    def _check(self) -> None:
        if self.settings.objective.startswith("itm") and len(self.distinct) < 2:
            raise DataError(
                f"'{self.pair.text.path}' is about {len(self.distinct)} image; matching needs wrong ones too"
            )

    def __getitem__(self, index: int) -> ObjectiveExample:
        return self.draw(index, derive_seed("objective", index))

    def draw(self, index: int, seed: int) -> ObjectiveExample:
        """Build example ``index`` with masks, or a wrong image, drawn from ``seed``."""
        make = _MAKERS[OBJECTIVES[self.settings.objective].example or ""]
        return make(self, index, random.Random(seed))  # noqa: S311 - not for secrets

    @property
    def answered(self) -> bool:
        """Always True: targets come from the inputs."""
        return True

    def example(self, index: int, fields: Mapping[str, Any]) -> ObjectiveExample:
        """Build an example with fixed draws."""
        return self[index]

    def text(self, index: int) -> Words:
        """Return the text of an example."""
        return Words([self.field(self.fields(index), "input_ids", index)])

    def region_counts(self, index: int) -> Sequence[int]:
        """Return the number of regions, unless they are masked or those of a drawn image."""
        return super().region_counts(index) if OBJECTIVES[self.settings.objective].example == "tokens" else ()

    def _masked_words(self, index: int, draws: random.Random) -> ObjectiveExample:
        database, text = self.pair.text, self.text(index)
        original = self.words(*text.parts, index=index)
        start, end = database.meta["v_range"]
        read, asked = [database.cls_id], [False]
        for part in text.parts:
            words, masked = mask_words(part, database.mask_id, (start, end), draws, self.settings.mask_probability)
            read += [*words, database.sep_id]
            asked += [*masked, False]
        mask = torch.tensor(asked)
        if not mask.any():
            raise self.unusable(index, "an empty text, which has no words to mask; leave it out")
        features, boxes = self.regions(index)
        example = self._example(index, torch.tensor(read), features, boxes)
        return replace(example, masked_tokens=mask, rows=original[mask])

    def _masked_regions(self, index: int, draws: random.Random) -> ObjectiveExample:
        features, boxes = self.regions(index)
        mask = torch.tensor(mask_regions(len(features), draws, self.settings.mask_probability))
        asked = (
            features if OBJECTIVES[self.settings.objective].head == "features" else self._soft_labels(index, len(mask))
        )
        seen = features.masked_fill(mask.unsqueeze(1), 0)
        text = self.words(*self.text(index).parts, index=index)
        return replace(self._example(index, text, seen, boxes), masked_regions=mask, rows=asked[mask])

    def _pair(self, index: int, draws: random.Random) -> ObjectiveExample:
        right: Any = self.image(index)
        match = draws.random() >= self.settings.negative_probability
        image: Any = right if match else wrong_image(self.distinct, right, draws)
        features, boxes = self.pair.images[image]
        example = self._example(index, self.words(*self.text(index).parts, index=index), features, boxes)
        return replace(example, target=int(match))

    def _soft_labels(self, index: int, regions: int) -> Tensor:
        labels = self.pair.images.soft_labels(self.image(index))
        if len(labels) != regions:
            raise self.unusable(index, f"{regions} regions, but class distributions of {len(labels)}; make them again")
        return labels

    def _example(self, index: int, words: Tensor, features: Tensor, boxes: Tensor) -> ObjectiveExample:
        text = self.text(index)
        counts = torch.tensor([len(part) + 1 for part in text.parts])
        counts[0] += 1  # [CLS]; the [SEP] after a part has the part's type
        types = None if text.types is None else torch.tensor(text.types).repeat_interleave(counts)
        return ObjectiveExample(self.ids[index], words, types, features, boxes, objective=self.settings.objective)


_MAKERS: Mapping[str, Callable[[ObjectiveSplit, int, random.Random], ObjectiveExample]] = {
    "tokens": ObjectiveSplit._masked_words,
    "regions": ObjectiveSplit._masked_regions,
    "pair": ObjectiveSplit._pair,
}


class VcrObjectiveSplit(ObjectiveSplit):
    """VCR's texts: a question with its right answer and, for the kind ``qar``, the right rationale.

    Arguments as for ``ObjectiveSplit``, and ``kind``: ``qa`` or ``qar``.
    """

    def __init__(
        self,
        task: DatabaseTask,
        name: str,
        pair: Pair,
        rows: Integers,
        settings: ObjectiveSettings,
        kind: str,
    ) -> None:
        self.kind = kind
        super().__init__(task, name, pair, rows, settings)

    def text(self, index: int) -> Words:
        """Return the question, the right answer and, for ``qar``, the right rationale."""
        fields = self.fields(index)
        choices = Choices(self, index, fields)
        answer = fields["input_ids_as"][choices.right_answer()]
        if self.kind == "qa":
            return Words([fields["input_ids"], answer], (QUESTION, ANSWER))
        right = choices.right("qar_target")
        if right is None:
            raise self.unusable(index, "no right rationale (-1): it cannot be trained on")
        return Words([fields["input_ids"], answer, fields["input_ids_rs"][right]], (QUESTION, ANSWER, RATIONALE))


@dataclass(frozen=True)
class MixturePart:
    """A part of a mixture.

    Attributes:
        name: name, unique within the mixture.
        label: label of its updates in logs; parts may share one.
        weight: relative frequency of updates from this part.
        split: its examples.
    """

    name: str
    label: str
    weight: float
    split: Split


class Mixture(ConcatenatedSplit):
    """Parts whose examples never share a batch; evaluated in sequence.

    Args:
        mixed: at least one part.
    """

    def __init__(self, mixed: Sequence[MixturePart]) -> None:
        super().__init__([part.split for part in mixed])
        self.mixed = list(mixed)

    def __getitem__(self, index: int) -> Example:
        """Return an example, its id prefixed with the part's name, because parts may share examples."""
        split, within = self._place(index)
        example = split[within]
        name = next(part.name for part in self.mixed if part.split is split)
        return replace(example, id=f"{name}:{example.id}")

    def sampler(self, batch: BatchConfig, seed: int) -> Sampler:
        """Return a sampler that draws a part for every update, by weight."""
        shares = [MixtureShare(part.name, part.label, part.weight, part.split.lengths) for part in self.mixed]
        return MixedSampler(shares, batch, seed)

    def cut(self, examples: int) -> list[list[Sequence[int]]]:
        """Cut each part separately."""
        ends = [0, *self._ends.tolist()]
        return [
            [range(at, min(at + examples, end)) for at in range(start, end, examples)] for start, end in pairwise(ends)
        ]
