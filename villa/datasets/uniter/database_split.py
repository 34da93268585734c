"""Splits that read their examples from a text database and the images that it names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from villa.datasets.base import DatasetConfig, Example, Split
from villa.datasets.samplers import Lengths
from villa.datasets.uniter.image_lmdb import ImageDatabase, PairedImageDatabase, check_pair
from villa.datasets.uniter.image_names import ImageNames
from villa.datasets.uniter.strings import Integers
from villa.datasets.uniter.tables import Numbers
from villa.datasets.uniter.text_lmdb import TextDatabase
from villa.errors import DataError

Images = ImageDatabase | PairedImageDatabase


@dataclass(frozen=True)
class Pair:
    """A text database with its images.

    Attributes:
        text: the texts.
        images: the regions of the images that they name.
    """

    text: TextDatabase
    images: Images

    def count(self, names: str | Sequence[str]) -> int:
        """Return the number of regions of an example's image or images."""
        if isinstance(self.images, PairedImageDatabase):
            return self.images.count(names)
        return self.images.count(names) if isinstance(names, str) else sum(map(self.images.count, names))

    def counts(self, named: ImageNames) -> Integers:
        """Return the numbers of regions ``[N]`` of examples, given their images."""
        if isinstance(self.images, PairedImageDatabase):
            return self.images.counts(named)
        return named.total(self._counts(self.images, named))

    @staticmethod
    def _counts(images: ImageDatabase, named: ImageNames) -> Integers:
        """Return the numbers of regions of all different images; 0 for those that no example has."""
        used = named.mentioned()
        found = np.zeros(len(named.distinct), np.int32)
        found[used.numbers()] = images.counts(used)
        return found


class Owner(Protocol):
    """The task that opens a split.

    Attributes:
        extra_words: rows of the word embedding beyond the tokenizer's.
        left_out: how many examples of a text database are not trained on, by its folder: a line for each reason.
    """

    extra_words: ClassVar[int]
    left_out: dict[Path, list[str]]

    @property
    def config(self) -> DatasetConfig:
        """The options."""


class DatabaseSplit(Split):
    """The examples of one pair of databases; a subclass makes them of what is stored.

    Args:
        task: the task.
        name: the split's name; ``train`` makes examples for training.
        pair: the databases.
        lengths: text length of every example by id, in the order of the split.

    Attributes:
        ids: ids of the examples.
        text_copies: how often the text of an example counts in its length.

    Raises:
        DataError: an image that the texts name is not there.
    """

    text_copies: ClassVar[int] = 1

    def __init__(self, task: Owner, name: str, pair: Pair, lengths: Mapping[str, int]) -> None:
        self.task, self.name, self.pair = task, name, pair
        numbers = Numbers.of(lengths)
        self.ids = numbers.texts
        self.check_images()
        # For batches by tokens: word-pieces and regions, as in the release.
        self._lengths = self.text_copies * numbers.values_array + pair.counts(self.named())

    @abstractmethod
    def example(self, id: str, fields: Mapping[str, Any]) -> Example:
        """Make an example of what the text database stores under ``id``.

        Raises:
            DataError: what is stored does not make an example of this task.
        """

    def warnings(self) -> list[str]:
        """Return how many examples of the database are not trained on, and why."""
        return self.task.left_out.get(self.pair.text.path, []) if self.name == "train" else []

    def image_names(self, id: str) -> str | Sequence[str]:
        """Return the name of an example's image, or the names of its images."""
        return self.pair.text.images[id]

    def named(self) -> ImageNames:
        """Return the image or images of every example."""
        return self.pair.text.images_of(self.ids)

    def check_images(self) -> None:
        """Make sure that the images of all examples are there, and that an example has one of them.

        Raises:
            DataError: naming both databases.
        """
        check_pair(self.pair.text, self.pair.images, ids=self.ids)
        named = self.named()
        several = named.first_list()
        if several is not None and isinstance(self.pair.images, ImageDatabase):
            raise self.unusable(
                self.ids[several],
                f"{len(named[several])} images; it is not one of '{self.task.config.name}', which have one",
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        id = self.ids[index]
        return self.example(id, self.pair.text[id])

    def describe(self, index: int) -> str:
        """See the base class."""
        return f"example '{self.ids[index]}' of '{self.pair.text.path}'"

    @property
    def lengths(self) -> Lengths:
        """Word-pieces and regions of every example."""
        return self._lengths

    @property
    def training(self) -> bool:
        """Whether examples are made for training."""
        return self.name == "train"

    @cached_property
    def stores_answers(self) -> bool:
        """Whether the first example has a ``target``: in a split with answers the others need not."""
        return bool(self.ids) and self.pair.text[self.ids[0]].get("target") is not None

    def words(self, *texts: Sequence[int], id: str) -> Tensor:
        """Return [CLS], the texts with [SEP] between them, and [SEP]: ``[T]`` int64.

        Raises:
            DataError: a text is no list of ids, or an id is outside the vocabulary.
        """
        database = self.pair.text
        ids = [database.cls_id]
        for text in texts:
            if not (isinstance(text, list) and all(type(word) is int for word in text)):
                raise self.unusable(id, f"the text {text!r:.40}; it must be a list of ids of word-pieces")
            ids += [*text, database.sep_id]
        limit = database.vocab_size + self.task.extra_words
        wrong = next((word for word in (min(ids), max(ids)) if not 0 <= word < limit), None)
        if wrong is not None:
            raise self.unusable(
                id, f"word-piece {wrong}, but the vocabulary of meta.json ends at {limit}; another tokenizer made it"
            )
        return torch.tensor(ids)

    def regions(self, id: str) -> tuple[Tensor, Tensor]:
        """Return the features ``[R, D]`` and boxes ``[R, 6]`` of an example's only image."""
        names: Any = self.image_names(id)
        features, boxes = self.pair.images[names]
        return features, boxes

    def field(self, fields: Mapping[str, Any], name: str, id: str) -> Any:
        """Return a field that an example must have.

        Raises:
            DataError: it has none; the message names what it has.
        """
        if name not in fields:
            raise self.unusable(id, f"no {name} (only {', '.join(fields)}); it is not one of '{self.task.config.name}'")
        return fields[name]

    def unusable(self, id: str, found: str) -> DataError:
        """Return the error that an example has something that this task cannot use."""
        return DataError(f"text database '{self.pair.text.path}': example '{id}' has {found}")


class ConcatenatedSplit(Split):
    """Several splits, one after another.

    Args:
        parts: at least one.
    """

    def __init__(self, parts: Sequence[Split]) -> None:
        self.parts = parts
        self._ends = torch.tensor([len(part) for part in parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        part, within = self._place(index)
        return part[within]

    def draw(self, index: int, seed: int) -> Example:
        """See the base class."""
        part, within = self._place(index)
        return part.draw(within, seed)

    def describe(self, index: int) -> str:
        """See the base class."""
        part, within = self._place(index)
        return part.describe(within)

    @property
    def answered(self) -> bool:
        """Whether every part has answers."""
        return all(part.answered for part in self.parts)

    @property
    def lengths(self) -> Lengths:
        """The parts' lengths one after another."""
        parts = [part.lengths for part in self.parts]
        return parts[0] if len(parts) == 1 else np.concatenate([np.asarray(part, np.int32) for part in parts])

    def warnings(self) -> list[str]:
        """Return what there is to know about each part."""
        return [warning for part in self.parts for warning in part.warnings()]

    def _place(self, index: int) -> tuple[Split, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(torch.searchsorted(self._ends, index, right=True))
        return self.parts[part], index - (int(self._ends[part - 1]) if part else 0)
