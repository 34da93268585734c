"""VQA v2 and SNLI-VE on the released databases: soft scores over a fixed list of answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from villa.batch import Batch
from villa.datasets.base import DatasetConfig, Example, best_answers, grouped, read_answers
from villa.datasets.ragged import Integers
from villa.datasets.released import ANSWERS_FILE
from villa.datasets.synthetic.tasks import ANSWERS
from villa.datasets.uniter.database_split import DatabaseSplit
from villa.datasets.uniter.databases import DatabaseConfig, DatabaseTask
from villa.errors import DataError
from villa.files import plain_path, write_json
from villa.json_values import is_score
from villa.registry import register_dataset

_LOG = logging.getLogger(__name__)


class SoftAnswerSplit(DatabaseSplit):
    """Questions whose targets are scores of answers."""

    task: SoftAnswers

    def example(self, index: int, fields: Mapping[str, Any]) -> Example:
        """Build an example with soft targets."""
        features, boxes = self.regions(index)
        words = self.words(self.field(fields, "input_ids", index), index=index)
        target = self._target(fields, index) if self.training or self.stores_answers else None
        return grouped(Example(self.ids[index], words, None, features, boxes, target), fields)

    def _target(self, fields: Mapping[str, Any], index: int) -> Tensor:
        """Return the scores ``[labels]``; all 0 without a known answer."""
        target = np.zeros(len(self.task.answers), np.float32)
        places = self.task.places(self.pair.text.path)
        stored = len(target) if places is None else len(places)
        given = self.field(fields, "target", index) if self.training else fields.get("target")
        given = {"labels": [], "scores": []} if given in (None, {}) else given
        if not _are_scores(given, stored):
            needed = f"labels below {stored}, as many as answers are known, and a score in [0, 1] for each"
            raise self.unusable(index, f"the target {given!r:.80}; needed are {needed}")
        labels: Integers = np.array(given["labels"], np.int64)
        scores = np.array(given["scores"], np.float32)
        labels = labels if places is None else places[labels]
        target[labels[labels >= 0]] = scores[labels >= 0]
        return torch.from_numpy(target)


def _are_scores(target: object, answers: int) -> bool:
    """Return whether a target is ``{"labels": [...], "scores": [...]}`` with labels below ``answers``."""
    match target:
        case {"labels": list(labels), "scores": list(scores)} if len(labels) == len(scores):
            return all(type(label) is int and 0 <= label < answers for label in labels) and all(map(is_score, scores))
    return False


class SoftAnswers(DatabaseTask):
    """A task whose targets are scores of answers."""

    Examples = SoftAnswerSplit

    @property
    def answers(self) -> list[str]:
        """Answers in the order of the logits."""
        assert self.labels is not None
        return list(self.labels)

    def places(self, database: Path) -> Integers | None:
        """Return the model's label for each label of a text database, -1 without one; None if they are the same."""
        return None

    def label_names(self) -> tuple[str, ...]:
        """Return the answers."""
        return tuple(self.answers)

    def rank(self, logits: Tensor) -> tuple[Tensor, Sequence[str]]:
        """Return the sigmoid scores of all answers."""
        return logits.float().sigmoid(), self.answers

    def decode(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Return the best answer of every row with its score."""
        return best_answers(*self.rank(logits))


@dataclass
class VqaConfig(DatabaseConfig):
    """Options of VQA, besides those that tasks on databases share.

    Attributes:
        answers: JSON file of the answers (the released ``ans2label.json``, 3,129 of them), below ``root``.
    """

    name: str = "vqa"
    answers: str = "ans2label.json"


@register_dataset("vqa")
class Vqa(SoftAnswers):
    """VQA v2: an answer's score reflects the annotators' agreement."""

    Config: ClassVar[type[DatasetConfig]] = VqaConfig
    config: VqaConfig

    @cached_property
    def answers(self) -> list[str]:
        """Answers in the order of the logits: the checkpoint's, or those of ``dataset.answers``."""
        if self.assets is not None:
            return read_answers(self.assets / ANSWERS_FILE)
        return read_answers(self._listed)

    @cache  # noqa: B019 (a data set lives as long as its run)
    def places(self, database: Path) -> Integers | None:
        """Match labels by their answers, listed with the examples or in ``dataset.answers``.

        Raises:
            DataError: the database and the model have no answer in common.
        """
        file = next((file for file in (database / ANSWERS, self._listed) if file.is_file()), None)
        stored = self.answers if file is None else read_answers(file)
        if stored == self.answers:
            return None
        labels = {answer: label for label, answer in enumerate(self.answers)}
        places = np.array([labels.get(answer, -1) for answer in stored])
        lost = int((places < 0).sum())
        if lost == len(places):
            raise DataError(
                f"none of the {lost} answers of '{file}' is among the {len(labels)} of the model; set dataset.answers "
                "to the list that the databases were made with"
            )
        if lost:
            _LOG.warning("%d of the %d answers of '%s' are not among the model's", lost, len(places), file)
        return places

    @property
    def _listed(self) -> Path:
        """File of the answers that the databases' labels index."""
        return self.root / plain_path(ANSWERS if self.config.synthetic else self.config.answers)

    def save_assets(self, folder: Path) -> None:
        """Write the answers and the assets of every task."""
        super().save_assets(folder)
        write_json(folder / ANSWERS_FILE, self.answers)


@dataclass
class SnliVeConfig(DatabaseConfig):
    """Options of SNLI-VE: those that tasks on databases share."""

    name: str = "snli_ve"


@register_dataset("snli_ve")
class SnliVe(SoftAnswers):
    """SNLI-VE: does an image entail a sentence, contradict it, or neither?"""

    Config: ClassVar[type[DatasetConfig]] = SnliVeConfig
    labels = ("contradiction", "entailment", "neutral")
