"""The interface of data sets: splits of examples, collation, decoding and assets."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from villa.batch import Batch
from villa.config.schema import BatchConfig
from villa.datasets.samplers import Lengths, Sampler, UpdateSampler
from villa.errors import DataError
from villa.facts import DataFacts, GroupReference, Written
from villa.files import lines_of, read_json, read_text


@dataclass
class DatasetConfig:
    """Options shared by all data sets: the registered name."""

    name: str = "jsonl"

    def objectives(self) -> dict[str, float]:
        """Return the objectives that batches name, with their relative frequencies among updates; none for a task."""
        return {}


#: One tensor, or a tuple with one per choice or image of an example; their lengths may differ.
Ragged = Tensor | tuple[Tensor, ...]


def parts_of(values: Ragged | None) -> tuple[Tensor, ...]:
    """Return the tensors of a field of an example; none if it is None."""
    return () if values is None else (values,) if isinstance(values, Tensor) else values


def in_form_of(values: Ragged | None, parts: list[Tensor]) -> Ragged | None:
    """Return parts in the form of ``values``: a tensor, a tuple, or None."""
    if values is None:
        return None
    return parts[0] if isinstance(values, Tensor) else tuple(parts)


@dataclass(frozen=True)
class Example:
    """One example before collation: unpadded tensors with the meaning of the fields of ``Batch``.

    Attributes:
        id: unique within the split.
        input_ids: ``[T]`` with [CLS] and [SEP], or a tuple of these, one per choice; None if a model's own processor
            reads ``text`` in collation.
        token_type_ids: like ``input_ids``, or None.
        features: ``[R, D]`` float16 or float32, or a tuple of these, one per image, or None.
        boxes: ``[R, 4 | 6 | 7]``, or a tuple like ``features``, or None.
        target: class index (int), indices ``[C]``, soft targets ``[labels]``, or None without an answer.
        reference: see ``Batch.references``.
        images: whole images, for models that read pixels: ``[3, H, W]`` bytes, or as a processor takes them.
        text: the text, for a processor.
        pair: a second text, or None.
        answer: the text to be generated, or None.
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


def grouped(example: Example, fields: Mapping[str, Any]) -> Example:
    """Return an example with the ``group`` and the ``subsets`` that its record names, if any."""
    if "group" not in fields and "subsets" not in fields:
        return example
    return replace(example, reference=GroupReference(fields.get("group"), fields.get("subsets", [])))


class Split(Dataset[Example], ABC):
    """One split: examples by index, with lengths that are known without reading them."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Example: ...

    @property
    def answered(self) -> bool:
        """Whether the examples have targets and can be scored; the first one decides."""
        first = self[0]
        return first.target is not None or first.answer is not None

    def draw(self, index: int, seed: int) -> Example:
        """Return example ``index`` for training, with all randomness derived from ``seed``.

        Every epoch uses another seed.
        """
        return self[index]

    def describe(self, index: int) -> str:
        """Return a name of example ``index`` for messages, without reading it."""
        return f"example {index}"

    @property
    @abstractmethod
    def lengths(self) -> Lengths:
        """Tokens plus regions of every example, for batches by tokens and of similar length."""

    def shown_text(self, index: int) -> str | None:
        """Return the text of example ``index`` as it was written, for people; None if it is not known."""
        return None

    def shown_image(self, index: int) -> Image.Image | None:
        """Return the image of example ``index``, for people; None if only its features are known."""
        image = next(iter(self[index].images), None)
        if isinstance(image, Tensor):
            return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        return image if isinstance(image, Image.Image) else None

    def region_counts(self, index: int) -> Sequence[int]:
        """Return the number of regions of each image of an example, if known without reading it.

        A batch of known sizes is read straight into its buffer; any other is copied there. The features of its examples
        are valid until the batch is put together.
        """
        return ()

    def warnings(self) -> list[str]:
        """Return what the user should know about the examples before a run, one line each."""
        return []

    def sampler(self, batch: BatchConfig, seed: int) -> Sampler:
        """Return the sampler that composes training updates."""
        return UpdateSampler(self.lengths, batch, seed)

    @property
    def sequential(self) -> bool:
        """Whether neighbouring examples share what is read for them, so that evaluation must keep their order."""
        return False

    def cut(self, examples: int) -> list[list[Sequence[int]]]:
        """Cut the split, in order, into batches of at most ``examples``; parts that cannot be mixed are cut apart.

        Every example is in one batch.
        """
        count = len(self)
        return [[range(start, min(start + examples, count)) for start in range(0, count, examples)]]


class TaskDataset(ABC):
    """A task's data: its splits, vocabulary and labels. ``@register_dataset`` registers a subclass.

    Args:
        config: an instance of ``Config``.
        assets: folder that ``save_assets`` wrote beside a checkpoint, from which vocabulary and labels are read
            instead of being built from the training split.
    """

    Config: ClassVar[type[DatasetConfig]] = DatasetConfig

    def __init__(self, config: Any, assets: Path | None = None) -> None:
        self.config = config
        self.assets = assets

    def splits(self) -> tuple[str, ...]:
        """Return the names of the splits."""
        return ("train", "val", "test")

    @abstractmethod
    def split(self, name: str) -> Split:
        """Return split ``name`` (``train``, ``val`` or ``test``).

        Raises:
            DataError: the split does not exist or its files cannot be used.
        """

    @abstractmethod
    def facts(self) -> DataFacts:
        """Return the sizes and names that the data fixes for a model."""

    def carry(self, assets: Path) -> str | None:
        """Adopt what the weights that a new run starts from depend on; by default nothing.

        Args:
            assets: folder that ``save_assets`` wrote beside the weights.

        Returns:
            A readable note on what was adopted, or None.
        """
        return None

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad examples into a batch."""

    def refine(self, batch: Batch, score: Callable[[Batch], Tensor]) -> Batch:
        """Return the micro-batch to train on, by default ``batch``.

        Data sets that select candidates by the model's scores (hard negatives) override it.

        Args:
            batch: the micro-batch, on the model's device.
            score: returns the current model's logits of a batch, in evaluation mode and without gradients.
        """
        return batch

    @abstractmethod
    def save_assets(self, folder: Path) -> None:
        """Write what prediction needs besides the weights (vocabulary, labels) into ``folder``."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of the data and of every option that changes an example, for provenance."""

    def requests(self, records: Sequence[Mapping[str, Any]]) -> Split:
        """Return a user's records (``{"image": path, "question": text, "id": ...}``) as examples to predict.

        Raises:
            DataError: a record lacks a field or names a file that cannot be read.
        """
        raise DataError(f"dataset '{self.config.name}' cannot predict on free records; predict on a split instead")

    def decode(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Decode the predictions of a batch into B records ``{"answer": ..., "score": ...}`` for prediction files.

        The predictions are what ``Model.predictions`` returns, usually the logits. By default they are ``[B, labels]``,
        and the answer is the index of the best class.
        """
        scores, classes = logits.softmax(-1).max(-1)
        pairs = zip(classes.tolist(), scores.tolist(), strict=True)
        return [{"answer": answer, "score": score} for answer, score in pairs]

    def rank(self, logits: Tensor) -> tuple[Tensor, Sequence[str]] | None:
        """Return the scores ``[B, labels]`` of all answers, and the answers; None if examples have one answer each."""
        return None

    def decode_written(self, written: Written, batch: Batch) -> list[dict[str, Any]]:
        """Decode generated texts into B records ``{"answer": text, "score": probability}``.

        Raises:
            DataError: the data set does not support generation.
        """
        raise DataError(
            f"dataset '{self.config.name}' does not read texts that a model writes; set dataset.target=text"
        )

    def submission(self, split: str) -> str | None:
        """Return the name of the submission format in which predictions on a split are also written, if any."""
        return None

    def reference_scores(self, split: str) -> dict[str, float]:
        """Return scores in [0, 1] of trivial baselines on a split (majority, question only)."""
        return {}


logger = logging.getLogger(__name__)


def plain_answer(answer: str) -> str:
    """Return an answer in the form of labels: without surrounding white space, otherwise unchanged."""
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
    """Read the labels of a user's own data: ``.json`` files as in ``read_answers``, others with one answer per line.

    A single empty line before or between answers is the empty answer, as in VQA v2's list. Empty lines are skipped if
    there are several, and at the end of the file.

    Raises:
        DataError: the file cannot be read, is empty, or lists an answer twice.
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
    """Return the contents of a file that ``read_answer_list`` reads as these answers.

    Args:
        path: the file's name; ``.json`` selects a JSON list, anything else one answer per line.
        answers: answers without surrounding white space.

    Raises:
        DataError: an answer has a line break, or the last one is empty, which lines cannot express.
    """
    if path.suffix == ".json":
        return json.dumps(list(answers), ensure_ascii=False, indent=0) + "\n"
    text = "".join(f"{answer}\n" for answer in answers)
    if "\r" in text or _listed(text) != list(answers):
        raise DataError(f"'{path}' cannot hold these answers one a line; give it a name that ends in .json")
    return text


def best_answers(scores: Tensor, answers: Sequence[str]) -> list[dict[str, Any]]:
    """Return the best of the ``answers``, with its score, for each row of ``scores [rows, answers]``."""
    best, labels = scores.max(-1)
    pairs = zip(labels.tolist(), best.tolist(), strict=True)
    return [{"answer": answers[label], "score": score} for label, score in pairs]


def top_answers(scores: Tensor, answers: Sequence[str], most: int) -> list[dict[str, Any]]:
    """Return what ``best_answers`` does, with the ``most`` best answers, best first, as ``top``."""
    found, labels = scores.sort(dim=-1, descending=True, stable=True)
    rows = zip(labels[:, :most].tolist(), found[:, :most].tolist(), strict=True)
    tops = [[{"answer": answers[label], "score": score} for label, score in zip(*row, strict=True)] for row in rows]
    return [{**top[0], "top": top} for top in tops]


def _listed(text: str) -> list[str]:
    """Return the lines of an answers file up to the last non-empty one."""
    answers = [plain_answer(line) for line in lines_of(text)]
    while answers and not answers[-1]:
        answers.pop()
    return answers


def _unique(answers: list[str], path: Path) -> list[str]:
    repeated = [answer for answer, count in Counter(answers).items() if count > 1]
    if repeated:
        raise DataError(f"the answers file '{path}' repeats '{repeated[0]}'; give every answer once")
    return answers
