"""What a data set owes the rest of villa."""

from __future__ import annotations

from abc import ABC, abstractmethod
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
from villa.models.base import DataFacts, Written


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
