"""What a data set owes the rest of villa."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.data import Dataset

from villa.batch import Batch
from villa.config.schema import BatchConfig
from villa.datasets.samplers import Lengths, Sampler, UpdateSampler
from villa.errors import DataError
from villa.facts import DataFacts, Written
from villa.files import lines_of, read_json, read_text


@dataclass
class DatasetConfig:
    """Options that every data set has: its registered name."""

    name: str = "jsonl"

    def objectives(self) -> dict[str, float]:
        """Objectives that batches name, with how often an update is of each, relative to others; none for a task."""
        return {}


#: One tensor, or a tuple with one for each choice or image of an example; their lengths may differ.
Ragged = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Example:
    """One example before collation; unpadded tensors with the meaning of the fields of ``Batch``.

    Attributes:
        id: unique within the split.
        input_ids: ``[T]`` with [CLS] and [SEP] in place, or a tuple of these, one a choice; None where a model's own
            processor reads ``text`` in collation.
        token_type_ids: like ``input_ids``, or None.
        features: ``[R, D]`` float16 or float32, or a tuple of these, one an image, or None.
        boxes: ``[R, 4 | 6 | 7]``, or a tuple like ``features``, or None.
        target: class index (int), indices ``[C]``, soft targets ``[labels]``, or None when there is no answer.
        reference: see ``Batch.references``.
        images: whole images, for models that read pixels: ``[3, H, W]`` bytes, or as a processor takes them.
        text: the text, for a processor.
        pair: a second text, or None.
        answer: the text that a model is to write, or None.
    """

    id: str
    input_ids: Ragged | None = None
    token_type_ids: Ragged | None = None
    features: Ragged | None = None
    boxes: Ragged | None = None
    target: int | Tensor | None = None
    reference: Any = None
    images: tuple[Any, ...] = ()
    text: str = ""
    pair: str | None = None
    answer: str | None = None


class Split(Dataset[Example], ABC):
    """One split: examples by index, with their lengths known without reading them."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Example: ...

    @property
    def answered(self) -> bool:
        """Whether the examples can be scored: the first one's answer is known, so all are."""
        first = self[0]
        return first.target is not None or first.answer is not None

    def draw(self, index: int, seed: int) -> Example:
        """Return example ``index`` for training; its random parts, if it has any, derive from ``seed`` alone.

        Every epoch serves an example with another seed.
        """
        return self[index]

    def describe(self, index: int) -> str:
        """Name example ``index`` in a message, so that a user finds it; it is not read for that."""
        return f"example {index}"

    @property
    @abstractmethod
    def lengths(self) -> Lengths:
        """Text tokens plus regions of every example, for token-bucket batches."""

    def warnings(self) -> list[str]:
        """Return what a user should know about the examples before they are used, a line each."""
        return []

    def sampler(self, batch: BatchConfig, seed: int) -> Sampler:
        """Return what says which examples make an update of training."""
        return UpdateSampler(self.lengths, batch, seed)

    def cut(self, examples: int) -> list[list[Sequence[int]]]:
        """Cut the split, in order, into batches of at most ``examples``; parts that cannot share one are apart."""
        count = len(self)
        return [[range(start, min(start + examples, count)) for start in range(0, count, examples)]]


class TaskDataset(ABC):
    """A task's data: its splits, vocabulary and labels. ``@register_dataset`` registers a subclass.

    Args:
        config: an instance of ``Config``.
        assets: folder with what ``save_assets`` wrote beside a checkpoint; the vocabulary and labels are then
            read from there instead of being built from the training split.
    """

    Config: ClassVar[type[DatasetConfig]] = DatasetConfig

    def __init__(self, config: Any, assets: Path | None = None) -> None:
        self.config = config
        self.assets = assets

    def splits(self) -> tuple[str, ...]:
        """Names of the splits that this data set has."""
        return ("train", "val", "test")

    @abstractmethod
    def split(self, name: str) -> Split:
        """Return split ``name`` (``train``, ``val`` or ``test``).

        Raises:
            DataError: the split does not exist or its files cannot be used.
        """

    @abstractmethod
    def facts(self) -> DataFacts:
        """What the data fixes about a model."""

    def carry(self, assets: Path) -> str | None:
        """Take over from the weights that a new run starts from what they cannot do without; by default nothing.

        Args:
            assets: folder with what ``save_assets`` wrote beside the weights.

        Returns:
            What was taken over, for people, or None.
        """
        return None

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad examples into a batch."""

    def refine(self, batch: Batch, score: Callable[[Batch], Tensor]) -> Batch:
        """Replace a training micro-batch by the one to train on; by default it stays as it is.

        Data sets that choose among candidates by the model's own opinion (hard negatives) do it here.

        Args:
            batch: on the model's device.
            score: logits of a batch by the model as it is now, in evaluation mode and without gradients.
        """
        return batch

    @abstractmethod
    def save_assets(self, folder: Path) -> None:
        """Write what prediction needs besides the weights (vocabulary, labels) into ``folder``."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of the data and of every option that changes an example, for provenance."""

    def requests(self, records: Sequence[Mapping[str, Any]]) -> Split:
        """Turn a user's records (``{"image": path, "question": text, "id": ...}``) into examples to predict.

        Raises:
            DataError: a record lacks a field or names a file that cannot be read.
        """
        raise DataError(f"dataset '{self.config.name}' cannot predict on free records; predict on a split instead")

    def decode(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Turn the predictions of a batch into B records ``{"answer": ..., "score": ...}`` for prediction files.

        They are the logits, or what ``Model.predictions`` makes of them. By default they are ``[B, labels]`` and the
        answer is the number of the best class.
        """
        scores, classes = logits.softmax(-1).max(-1)
        pairs = zip(classes.tolist(), scores.tolist(), strict=True)
        return [{"answer": answer, "score": score} for answer, score in pairs]

    def decode_written(self, written: Written, batch: Batch) -> list[dict[str, Any]]:
        """Turn the texts that a generative model wrote into B records ``{"answer": text, "score": probability}``.

        Raises:
            DataError: the data set has no use for texts.
        """
        raise DataError(
            f"dataset '{self.config.name}' does not read texts that a model writes; set dataset.target=text"
        )

    def submission(self, split: str) -> str | None:
        """Name of the registered submission format that predictions on a split are also written in."""
        return None

    def reference_scores(self, split: str) -> dict[str, float]:
        """Scores of trivial baselines on a split (majority, question only), in [0, 1], computed from the data."""
        return {}


logger = logging.getLogger(__name__)


def plain_answer(answer: str) -> str:
    """Return an answer as labels know it: without the white space around it.

    Nothing else of it is changed: case, punctuation and white space within are the user's.
    """
    return answer.strip()


def read_answers(path: Path) -> list[str]:
    """Read a list of answers, or an object ``{answer: label}`` as in the released ``ans2label.json``.

    Raises:
        DataError: the file is missing, lists an answer twice, or holds something else.
    """
    value = read_json(path, "list of answers", "give ans2label.json")
    if isinstance(value, dict):
        if sorted(map(repr, value.values())) != sorted(map(repr, range(len(value)))):
            raise DataError(f"'{path}' must give the labels 0 to {len(value) - 1}, each to one answer")
        value = sorted(value, key=value.__getitem__)
    if not (isinstance(value, list) and value and all(isinstance(answer, str) for answer in value)):
        raise DataError(f"'{path}' holds no answers; give a JSON list of texts, or an object {{answer: label}}")
    return _unique(value, path)


def read_answer_list(path: Path) -> list[str]:
    """Read the answers that are the labels of a user's own data: ``.json`` as ``read_answers``, else one a line.

    An empty line between two answers, or before the first, is the empty answer, as in VQA v2's list; where there are
    several, which cannot all be it, and at the end of the file, empty lines are passed over.

    Raises:
        DataError: the file cannot be read, holds none, or lists an answer twice.
    """
    if path.suffix == ".json":
        return _unique([plain_answer(answer) for answer in read_answers(path)], path)
    answers = _listed(read_text(path, "answers file", "give a text file with one answer a line"))
    if any("\r" in answer for answer in answers):
        raise DataError(f"'{path}' ends lines with carriage returns alone; end them with line feeds")
    empty = answers.count("")
    if empty > 1:
        logger.warning("%s: %d empty lines are passed over; a single one would be the empty answer", path, empty)
        answers = [answer for answer in answers if answer]
    elif empty:
        logger.warning("%s:%d: the empty line is taken for the empty answer", path, answers.index("") + 1)
    if not answers:
        raise DataError(f"the answers file '{path}' is empty; give every answer once, one a line")
    return _unique(answers, path)


def answer_list(path: Path, answers: Sequence[str]) -> str:
    """Return the contents of a file from which ``read_answer_list`` reads these answers.

    Args:
        path: its name; one that ends in ``.json`` is for a JSON list, others are for one answer a line.
        answers: without white space around them.

    Raises:
        DataError: lines cannot hold them: one has a line break in it, or the empty answer is the last one.
    """
    if path.suffix == ".json":
        return json.dumps(list(answers), ensure_ascii=False, indent=0) + "\n"
    text = "".join(f"{answer}\n" for answer in answers)
    if "\r" in text or _listed(text) != list(answers):
        raise DataError(f"'{path}' cannot hold these answers one a line; give it a name that ends in .json")
    return text


def best_answers(scores: Tensor, answers: Sequence[str]) -> list[dict[str, Any]]:
    """Return the best of the ``answers`` in every row of ``scores [rows, answers]``, with its score."""
    best, labels = scores.max(-1)
    pairs = zip(labels.tolist(), best.tolist(), strict=True)
    return [{"answer": answers[label], "score": score} for label, score in pairs]


def _listed(text: str) -> list[str]:
    """Return the lines of an answers file up to the last that is not empty."""
    answers = [plain_answer(line) for line in lines_of(text)]
    while answers and not answers[-1]:
        answers.pop()
    return answers


def _unique(answers: list[str], path: Path) -> list[str]:
    repeated = [answer for answer, count in Counter(answers).items() if count > 1]
    if repeated:
        raise DataError(f"the answers file '{path}' repeats '{repeated[0]}'; give every answer once")
    return answers
