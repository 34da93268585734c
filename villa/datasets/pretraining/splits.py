"""Splits of pre-training: every text with its image, as examples of one objective."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from villa.datasets.database_split import DatabaseSplit, Pair
from villa.datasets.databases import DatabaseTask
from villa.datasets.pretraining.examples import ObjectiveExample
from villa.datasets.pretraining.masking import mask_regions, mask_words, wrong_image
from villa.datasets.vcr import ANSWER, QUESTION, RATIONALE, Choices
from villa.engine.rng import derive_seed
from villa.errors import DataError


@dataclass(frozen=True)
class ObjectiveSettings:
    """What an objective asks for.

    Attributes:
        objective: its name.
        mask_probability: share of the words or regions that are masked.
        negative_probability: share of the pairs that do not match.
    """

    objective: str
    mask_probability: float = 0.15
    negative_probability: float = 0.5


class Words(NamedTuple):
    """A text before [CLS] and [SEP].

    Attributes:
        parts: word-pieces of its parts, which [SEP] keeps apart.
        types: token type of each part, or None where all are 0.
    """

    parts: Sequence[Sequence[int]]
    types: tuple[int, ...] | None = None


class ObjectiveSplit(DatabaseSplit):
    """Texts and images for one objective. In training, masks and wrong images are drawn anew in every epoch.

    Several splits may share a pair of databases.

    Args:
        task: the task.
        name: the split's name.
        pair: the databases.
        lengths: text length of every text by id.
        settings: the objective.

    Raises:
        DataError: pairs are to be matched, but there is one image only.
    """

    def __init__(
        self, task: DatabaseTask, name: str, pair: Pair, lengths: Mapping[str, int], settings: ObjectiveSettings
    ) -> None:
        super().__init__(task, name, pair, lengths)
        self.settings = settings
        self.images = self.named().single()
        self._check()

    def asking(self, settings: ObjectiveSettings) -> ObjectiveSplit:
        """Return the same texts for another objective; what was read about them is shared.

        Raises:
            DataError: as for a new split.
        """
        other = copy.copy(self)
        other.settings = settings
        other._check()
        return other

    def _check(self) -> None:
        if self.settings.objective.startswith("itm") and len(self.images) < 2:
            raise DataError(f"'{self.pair.text.path}' is about {len(self.images)} image; matching needs wrong ones too")

    def __getitem__(self, index: int) -> ObjectiveExample:
        return self.draw(index, derive_seed("objective", index))

    def draw(self, index: int, seed: int) -> ObjectiveExample:
        """Return example ``index`` with masks, or a wrong image, that derive from ``seed``."""
        make = _MAKERS[self.settings.objective]
        return make(self, self.ids[index], random.Random(seed))  # noqa: S311 - no secret

    @property
    def answered(self) -> bool:
        """What is asked for is known."""
        return True

    def example(self, id: str, fields: Mapping[str, Any]) -> ObjectiveExample:
        """Make the example of a text, with fixed draws."""
        return self[self.ids.index(id)]

    def text(self, id: str) -> Words:
        """Return the text that an example reads."""
        return Words([self.field(self.pair.text[id], "input_ids", id)])

    def _masked_words(self, id: str, draws: random.Random) -> ObjectiveExample:
        database, text = self.pair.text, self.text(id)
        original = self.words(*text.parts, id=id)
        start, end = database.meta["v_range"]
        read, asked = [database.cls_id], [False]
        for part in text.parts:
            words, masked = mask_words(part, database.mask_id, (start, end), draws, self.settings.mask_probability)
            read += [*words, database.sep_id]
            asked += [*masked, False]
        mask = torch.tensor(asked)
        if not mask.any():
            raise self.unusable(id, "an empty text, which has no words to mask; leave it out")
        features, boxes = self.regions(id)
        example = self._example(id, torch.tensor(read), features, boxes)
        return replace(example, masked_tokens=mask, rows=original[mask])

    def _masked_regions(self, id: str, draws: random.Random) -> ObjectiveExample:
        features, boxes = self.regions(id)
        mask = torch.tensor(mask_regions(len(features), draws, self.settings.mask_probability))
        rows = features[mask] if self.settings.objective == "mrfr" else self._soft_labels(id, len(features))[mask]
        seen = features.masked_fill(mask.unsqueeze(1), 0)
        text = self.words(*self.text(id).parts, id=id)
        return replace(self._example(id, text, seen, boxes), masked_regions=mask, rows=rows)

    def _pair(self, id: str, draws: random.Random) -> ObjectiveExample:
        right: Any = self.image_names(id)
        match = draws.random() >= self.settings.negative_probability
        name = right if match else wrong_image(self.images, right, draws)
        features, boxes = self.pair.images[name]
        example = self._example(id, self.words(*self.text(id).parts, id=id), features, boxes)
        return replace(example, target=int(match))

    def _soft_labels(self, id: str, regions: int) -> Tensor:
        names: Any = self.image_names(id)
        labels = self.pair.images.soft_labels(names)
        if len(labels) != regions:
            raise self.unusable(id, f"{regions} regions, but class distributions of {len(labels)}; make them again")
        return labels

    def _example(self, id: str, words: Tensor, features: Tensor, boxes: Tensor) -> ObjectiveExample:
        text = self.text(id)
        counts = torch.tensor([len(part) + 1 for part in text.parts])
        counts[0] += 1  # [CLS]; the [SEP] behind a part has the part's type
        types = None if text.types is None else torch.tensor(text.types).repeat_interleave(counts)
        return ObjectiveExample(id, words, types, features, boxes, objective=self.settings.objective)


_MAKERS: Mapping[str, Callable[[ObjectiveSplit, str, random.Random], ObjectiveExample]] = {
    "mlm": ObjectiveSplit._masked_words,
    **dict.fromkeys(("mrfr", "mrc", "mrc_kl"), ObjectiveSplit._masked_regions),
    **dict.fromkeys(("itm", "itm_wra"), ObjectiveSplit._pair),
}


class VcrObjectiveSplit(ObjectiveSplit):
    """VCR's own texts: a question with its right answer, or with the right rationale behind it.

    Args:
        task: the task.
        name: the split's name.
        pair: the databases.
        lengths: text length of every question by id.
        settings: the objective: masked words or regions.
        kind: ``qa`` or ``qar``.
    """

    def __init__(
        self,
        task: DatabaseTask,
        name: str,
        pair: Pair,
        lengths: Mapping[str, int],
        settings: ObjectiveSettings,
        kind: str,
    ) -> None:
        self.kind = kind
        super().__init__(task, name, pair, lengths, settings)

    def text(self, id: str) -> Words:
        """Return the question, the right answer and, for ``qar``, the right rationale."""
        fields = self.pair.text[id]
        choices = Choices(self, id, fields)
        answer = fields["input_ids_as"][choices.right_answer()]
        if self.kind == "qa":
            return Words([fields["input_ids"], answer], (QUESTION, ANSWER))
        right = choices.right("qar_target")
        if right is None:
            raise self.unusable(id, "no right rationale (-1): it cannot be trained on")
        return Words([fields["input_ids"], answer, fields["input_ids_rs"][right]], (QUESTION, ANSWER, RATIONALE))
