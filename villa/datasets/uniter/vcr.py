"""VCR on the released databases: select an answer and its rationale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from villa.batch import Batch
from villa.config.variants import Overlay
from villa.datasets.base import DatasetConfig, Example, Split
from villa.datasets.paths import SPLITS, DatabasePaths
from villa.datasets.ragged import Integers
from villa.datasets.synthetic.overlay import SMALL_VCR
from villa.datasets.uniter.box_selection import BoxSelection
from villa.datasets.uniter.database_split import DatabaseSplit, Images, Pair
from villa.datasets.uniter.databases import DatabaseConfig, DatabaseTask
from villa.datasets.uniter.image_lmdb import PairedImageStore
from villa.errors import ConfigError
from villa.facts import CHOICES, VcrReference
from villa.registry import register_dataset

#: Tokens beyond the tokenizer's: object names.
OBJECT_NAMES = 81
#: Token types; regions have type 1.
QUESTION, ANSWER, RATIONALE = 0, 2, 3


@dataclass
class VcrConfig(DatabaseConfig):
    """Options of VCR, besides those that tasks on databases share.

    Images are ``"ground truth folder;detected folder"``.

    Attributes:
        ground_truth_boxes: number in the name of the databases of ground-truth boxes; all boxes stored are used.
        all_rationales: splits (of ``val``, ``test``) where rationales are scored for each of the four answers, as
            the leaderboard wants them, and not for the right answer alone.
    """

    OVERLAYS: ClassVar[tuple[Overlay, ...]] = SMALL_VCR

    name: str = "vcr"
    max_text_length: int = 220
    ground_truth_boxes: int = 100
    all_rationales: tuple[str, ...] = ("test",)

    def check(self) -> None:
        """Check that the options are consistent."""
        super().check()
        for split in SPLITS:
            for images in getattr(self, f"{split}_images"):
                if images.count(";") != 1:
                    raise ConfigError(
                        f"dataset.{split}_images: '{images}' must name two folders, ground truth and detected boxes, "
                        "with a semicolon between them"
                    )


class ChoiceSplit(DatabaseSplit):
    """Training examples: the four answers to a question, or the four rationales for its answer.

    Arguments as for ``DatabaseSplit``, and ``kind``: ``qa`` or ``qar``.
    """

    def __init__(self, task: DatabaseTask, name: str, pair: Pair, rows: Integers, kind: str) -> None:
        self.kind = kind
        super().__init__(task, name, pair, rows)

    def example(self, index: int, fields: Mapping[str, Any]) -> Example:
        """Build an example of four choices; targets ``[4]`` mark the right one."""
        choices = Choices(self, index, fields)
        texts = choices.answers() if self.kind == "qa" else choices.rationales(choices.right_answer())
        right = choices.right(f"{self.kind}_target")
        if right is None:
            raise self.unusable(index, "no right choice (-1): it cannot be trained on")
        return _example(self, index, f"{self.ids[index]}:{self.kind}", texts, [right])


class VcrQuestionSplit(DatabaseSplit):
    """Questions with answers and rationales: 8 choices per example, or 20 with each answer's rationales.

    Arguments as for ``DatabaseSplit``, and ``all_rationales``: include the rationales for all four answers instead of
    only those for the right one.
    """

    def __init__(self, task: DatabaseTask, name: str, pair: Pair, rows: Integers, all_rationales: bool) -> None:
        self.all_rationales = all_rationales
        super().__init__(task, name, pair, rows)

    def example(self, index: int, fields: Mapping[str, Any]) -> Example:
        """Build an example; targets mark the right answer, followed by the right rationale."""
        choices = Choices(self, index, fields)
        reference = VcrReference(choices.right("qa_target"), choices.right("qar_target"))
        explained = range(CHOICES) if self.all_rationales else [choices.right_answer()]
        texts = choices.answers() + [text for answer in explained for text in choices.rationales(answer)]
        if reference.answer is None or reference.rationale is None:
            return _example(self, index, self.ids[index], texts, None, reference)
        group = 1 + (reference.answer if self.all_rationales else 0)
        right = [reference.answer, CHOICES * group + reference.rationale]
        return _example(self, index, self.ids[index], texts, right, reference)


@register_dataset("vcr")
class Vcr(DatabaseTask):
    """VCR. Training mixes two kinds of examples: four answers to a question, and four rationales for its answer."""

    Config: ClassVar[type[DatasetConfig]] = VcrConfig
    config: VcrConfig
    extra_words = OBJECT_NAMES

    def parts(self, name: str, pair: Pair) -> list[Split]:
        """Return training examples of both kinds, or questions with all answers and rationales."""
        if name != "train":
            asked = replace(pair, text=pair.text.of_kind("qar"))
            return [
                VcrQuestionSplit(self, name, asked, self.chosen(name, asked.text), name in self.config.all_rationales)
            ]
        pairs = [(kind, replace(pair, text=pair.text.of_kind(kind))) for kind in ("qa", "qar")]
        return [ChoiceSplit(self, name, pair, self.chosen(name, pair.text), kind) for kind, pair in pairs]

    def open_images(self, paths: DatabasePaths) -> Images:
        """Open ground-truth boxes with their fixed number, and detected ones as usual."""
        fixed = BoxSelection(fixed=self.config.ground_truth_boxes, compressed=self.config.compressed)
        detected = self.image_database(paths.images[1], self.config.detected_boxes())
        return PairedImageStore(self.image_database(paths.images[0], fixed), detected)

    def submission(self, split: str) -> str | None:
        """Return the format only for splits with all rationales, as submissions need them."""
        return super().submission(split) if split in self.config.all_rationales else None

    def decode(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Return the best answer and the ``probabilities`` of all choices, normalised in groups of four."""
        groups = logits.float()[:, 1].reshape(len(batch), -1, CHOICES).softmax(-1)
        scores, answers = groups[:, 0].max(-1)
        columns = (answers.tolist(), scores.tolist(), groups.flatten(1).tolist())
        return [
            {"answer": answer, "score": score, "probabilities": probabilities}
            for answer, score, probabilities in zip(*columns, strict=True)
        ]


#: Tokens ``[T]`` and their types ``[T]``.
Text = tuple[Tensor, Tensor]


class Choices:
    """The texts of a question.

    An answer's row is [CLS] question [SEP] answer [SEP]; a rationale's continues with rationale [SEP].

    Args:
        split: the split, for its special tokens and for messages.
        index: index of the question in the split.
        fields: the stored fields.

    Raises:
        DataError: the question does not have four answers and rationales.
    """

    def __init__(self, split: DatabaseSplit, index: int, fields: Mapping[str, Any]) -> None:
        self._split, self._index, self._fields = split, index, fields
        self._question: Sequence[int] = split.field(fields, "input_ids", index)
        self._answers = self._four("input_ids_as")
        self._rationales = self._four("input_ids_rs")

    def answers(self) -> list[Text]:
        """Return the four answers."""
        return [self._text((self._question, answer), (QUESTION, ANSWER)) for answer in self._answers]

    def rationales(self, answer: int) -> list[Text]:
        """Return the four rationales after answer ``answer``."""
        before = (self._question, self._answers[answer])
        return [self._text((*before, rationale), (QUESTION, ANSWER, RATIONALE)) for rationale in self._rationales]

    def right(self, name: str) -> int | None:
        """Return the index in ``qa_target`` or ``qar_target``; None if it is -1 (test)."""
        value = self._split.field(self._fields, name, self._index)
        if type(value) is not int or not -1 <= value < CHOICES:
            raise self._split.unusable(
                self._index, f"{name} {value!r:.40}; it must be 0 to 3, or -1 where it is not known"
            )
        return None if value < 0 else value

    def right_answer(self) -> int:
        """Return the right answer, which rationales refer to."""
        answer = self.right("qa_target")
        if answer is None:
            raise self._split.unusable(
                self._index, "no right answer to choose the rationales of; name its split in dataset.all_rationales"
            )
        return answer

    def _text(self, parts: Sequence[Sequence[int]], types: Sequence[int]) -> Text:
        """Join the parts with [CLS] or [SEP] before each; the last [SEP] has the last part's type."""
        words = self._split.words(*parts, index=self._index)
        counts = torch.tensor([len(part) + 1 for part in parts])
        counts[-1] += 1
        return words, torch.tensor(types).repeat_interleave(counts)

    def _four(self, name: str) -> Sequence[Sequence[int]]:
        value: Sequence[Sequence[int]] = self._split.field(self._fields, name, self._index)
        if not isinstance(value, list):
            raise self._split.unusable(self._index, f"{name} {value!r:.40}; needed are {CHOICES} texts")
        if len(value) != CHOICES:
            raise self._split.unusable(self._index, f"{len(value)} {name}; needed are {CHOICES}")
        return value


def _example(
    split: DatabaseSplit,
    index: int,
    name: str,
    texts: Sequence[Text],
    right: Sequence[int] | None,
    reference: VcrReference | None = None,
) -> Example:
    """Build an example from a question's image and texts; ``right`` are the indices of the right choices."""
    features, boxes = split.regions(index)
    words, types = zip(*texts, strict=True)
    target = None if right is None else torch.zeros(len(texts), dtype=torch.long)
    if target is not None:
        target[list(right or ())] = 1
    return Example(name, words, types, features, boxes, target, reference)
