"""Splits whose examples come from a text database and the image database that it refers to."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from villa.datasets.base import DatasetConfig, Example, Split
from villa.datasets.ragged import Integers, Ragged
from villa.datasets.samplers import Lengths
from villa.datasets.uniter.image_lmdb import ImageStore, PairedImageStore
from villa.datasets.uniter.index import Built, Column, Names, cached, find
from villa.datasets.uniter.text_lmdb import TextStore
from villa.errors import DataError
from villa.files import regular_file

Images = ImageStore | PairedImageStore

#: Columns of the index of images: rows in the image database, and whether ``txt2img.json`` has a list for the example.
_IMAGES = pa.schema([("rows", pa.list_(pa.int32())), ("listed", pa.bool_())])
#: Image row of an example missing from ``txt2img.json``; the row of a missing image is -1.
_UNLISTED = -2


@dataclass(frozen=True)
class Pair:
    """A text database and its image database.

    Attributes:
        text: the texts.
        images: the regions of their images.
    """

    text: TextStore
    images: Images

    @cached_property
    def image_rows(self) -> Ragged:
        """Image rows of every text.

        Raises:
            DataError: ``txt2img.json`` cannot be used.
        """
        column = self._index["rows"].combine_chunks()
        return Ragged(column.values.to_numpy(), column.offsets.to_numpy())

    def lists_images(self, rows: Integers) -> npt.NDArray[np.bool_]:
        """Return for texts ``[N]`` whether each has a list of images, perhaps of length one."""
        listed: npt.NDArray[np.bool_] = self._index["listed"].to_numpy()[rows]
        return listed

    def counts(self, images: Ragged) -> Integers:
        """Return the numbers of regions ``[N]`` of examples, given their image rows."""
        if isinstance(self.images, PairedImageStore):
            ground_truth = self.images.ground_truth.counts(images.values[::2])
            return ground_truth + self.images.detected.counts(images.values[1::2])
        return images.sums(self.images.counts(images.values))

    def images_of(self, rows: Integers | None = None) -> Ragged:
        """Return the image rows of texts; check that all images exist and that a sample is readable.

        Args:
            rows: rows of the texts ``[N]``; all by default.

        Raises:
            DataError: an image is missing, or a text has no image.
        """
        chosen = np.arange(len(self.text), dtype=np.int32) if rows is None else rows
        found = self.image_rows.take(chosen)
        (unlisted,) = np.nonzero(found.values == _UNLISTED)
        if len(unlisted):
            id = self.text.ids[int(chosen[np.searchsorted(found.bounds, unlisted[0], "right") - 1])]
            raise DataError(f"text database '{self.text.path}': {self.text.images_file.name} lacks the example '{id}'")
        if isinstance(self.images, ImageStore):
            self.images.check_all(found.values, lambda: self._names(chosen), self.text.path)
            return found
        (others,) = np.nonzero((found.sizes != 2) | ~self.lists_images(chosen))
        if len(others):
            one = chosen[others[:1]]
            names = self._names(one)
            named = f"{names if self.lists_images(one)[0] else names[0]!r:.80}"
            raise DataError(f"text database '{self.text.path}' names {named}, but two image databases were given")
        for start, images in enumerate((self.images.ground_truth, self.images.detected)):
            of_one = partial(lambda start: self._names(chosen)[start::2], start)
            images.check_all(found.values[start::2], of_one, self.text.path)
        return found

    @cached_property
    def _index(self) -> pa.Table:
        text, ids = self.text, self.text.ids
        with text.reading_images():
            files = [text.list_file, text.images_file]
            size = sum(regular_file(file).st_size for file in files)
            return cached([*files, *self.images.files], "images", _IMAGES, lambda: self._locate(ids.column), size)

    def _locate(self, ids: Column) -> Built:
        """Look up the texts' images in the image database."""
        named = self.text.named_images()
        bounds = np.concatenate([[0], np.cumsum(named.sizes)])
        if isinstance(self.images, PairedImageStore):  # names of both databases alternate
            first = self.images.ground_truth.find(named.names)
            second = (np.arange(len(named.names)) - np.repeat(bounds[:-1], named.sizes)) % 2 == 1
            values = np.where(second, self.images.detected.find(named.names), first)
        else:
            values = self.images.find(named.names)
        found, listed = Ragged(values, bounds), named.listed
        if not named.texts.equals(ids):  # in another order, or with additional texts
            places = find(ids, named.texts)
            places[places < 0] = len(found)
            found = Ragged(np.append(values, _UNLISTED), np.append(bounds, len(values) + 1)).take(places)
            listed = np.append(listed, False)[places]
        offsets = pa.array(found.bounds, pa.int32())
        rows = pa.ListArray.from_arrays(offsets, pa.array(found.values, pa.int32()))
        return [pa.table([rows, pa.array(listed)], schema=_IMAGES)]

    def _names(self, rows: Integers) -> list[str]:
        """Re-read the names of the texts' images for a message."""
        named = self.text.named_images()
        every = Ragged(np.arange(len(named.names)), np.concatenate([[0], np.cumsum(named.sizes)]))
        places = find(self.text.ids.column.take(pa.array(rows)), named.texts)
        return list(Names(named.names).take(every.take(places).values))


class Owner(Protocol):
    """The task that opens a split.

    Attributes:
        extra_words: rows of the word embedding beyond the tokenizer's.
        left_out: notes on the examples excluded from training, by text database.
    """

    extra_words: ClassVar[int]
    left_out: dict[Path, list[str]]

    @property
    def config(self) -> DatasetConfig:
        """The data set's options."""


class DatabaseSplit(Split):
    """The examples of one pair of databases; a subclass builds them from the stored fields.

    Args:
        task: the task.
        name: the split's name; ``train`` builds training examples.
        pair: the databases.
        rows: rows of the examples in the text database ``[N]``.

    Attributes:
        rows: rows of the examples in the text database ``[N]``.
        ids: ids of the examples.
        images: image rows of every example.
        text_copies: how often an example's text counts in its length.

    Raises:
        DataError: an image is missing.
    """

    text_copies: ClassVar[int] = 1

    def __init__(self, task: Owner, name: str, pair: Pair, rows: Integers) -> None:
        self.task, self.name, self.pair, self.rows = task, name, pair, rows
        self.ids = pair.text.ids.take(rows)
        self.images = self.find_images()
        # Lengths for token batches: word-pieces and regions, as in the release.
        self._lengths = self.text_copies * pair.text.lengths[rows] + pair.counts(self.images)

    @abstractmethod
    def example(self, index: int, fields: Mapping[str, Any]) -> Example:
        """Build example ``index`` from the stored fields.

        Raises:
            DataError: the fields do not suit this task.
        """

    def warnings(self) -> list[str]:
        """Return notes on the examples excluded from training."""
        return self.task.left_out.get(self.pair.text.path, []) if self.name == "train" else []

    def find_images(self) -> Ragged:
        """Check that the images of all examples exist, one per example; return their rows.

        Raises:
            DataError: an image is missing, or an example has several.
        """
        found = self.pair.images_of(self.rows)
        (several,) = np.nonzero(self.pair.lists_images(self.rows))
        if len(several) and isinstance(self.pair.images, ImageStore):
            index = int(several[0])
            raise self.unusable(
                index, f"{found.sizes[index]} images; it is not one of '{self.task.config.name}', which have one"
            )
        return found

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.example(index, self.fields(index))

    def fields(self, index: int) -> dict[str, Any]:
        """Read an example's stored fields."""
        return self.pair.text[int(self.rows[index])]

    def describe(self, index: int) -> str:
        """Return the example's id and its database."""
        return f"example '{self.ids[index]}' of '{self.pair.text.path}'"

    @property
    def lengths(self) -> Lengths:
        """Word-pieces and regions of every example."""
        return self._lengths

    def region_counts(self, index: int) -> Sequence[int]:
        """Return the number of regions of each image of an example, unless they are stitched together when read."""
        store = self.pair.images
        return () if isinstance(store, PairedImageStore) else [store.count(row) for row in self.images[index]]

    @property
    def training(self) -> bool:
        """Whether this split builds training examples."""
        return self.name == "train"

    @cached_property
    def stores_answers(self) -> bool:
        """Whether the first example has a ``target``; others of an answered split may lack one."""
        return len(self) > 0 and self.fields(0).get("target") is not None

    def words(self, *texts: Sequence[int], index: int) -> Tensor:
        """Return the tokens [CLS] text [SEP] text [SEP] ...: ``[T]`` int64.

        Raises:
            DataError: a text is not a list of ids, or an id is outside the vocabulary.
        """
        database = self.pair.text
        ids = [database.cls_id]
        for text in texts:
            if not (isinstance(text, list) and all(type(word) is int for word in text)):
                raise self.unusable(index, f"the text {text!r:.40}; it must be a list of ids of word-pieces")
            ids += [*text, database.sep_id]
        limit = database.vocab_size + self.task.extra_words
        wrong = next((word for word in (min(ids), max(ids)) if not 0 <= word < limit), None)
        if wrong is not None:
            raise self.unusable(
                index, f"word-piece {wrong}, but the vocabulary of meta.json ends at {limit}; another tokenizer made it"
            )
        return torch.from_numpy(np.array(ids, np.int64))  # faster than torch.tensor

    def image(self, index: int) -> Any:
        """Return the key of an example's only image: its row, or a row in each of two paired databases."""
        rows = self.images[index]
        return rows if isinstance(self.pair.images, PairedImageStore) else rows[0]

    def regions(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the features ``[R, D]`` and boxes ``[R, 6]`` of an example's only image."""
        features, boxes = self.pair.images[self.image(index)]
        return features, boxes

    def field(self, fields: Mapping[str, Any], name: str, index: int) -> Any:
        """Return a required field of an example.

        Raises:
            DataError: the field is missing; the message lists the others.
        """
        if name not in fields:
            raise self.unusable(
                index, f"no {name} (only {', '.join(fields)}); it is not one of '{self.task.config.name}'"
            )
        return fields[name]

    def unusable(self, index: int, found: str) -> DataError:
        """Return the error that an example holds something that this task cannot use."""
        return DataError(f"text database '{self.pair.text.path}': example '{self.ids[index]}' has {found}")


class ConcatenatedSplit(Split):
    """Several splits in sequence.

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
        """Draw an example from its part."""
        part, within = self._place(index)
        return part.draw(within, seed)

    def describe(self, index: int) -> str:
        """Describe an example of a part."""
        part, within = self._place(index)
        return part.describe(within)

    def region_counts(self, index: int) -> Sequence[int]:
        """Return the numbers of regions of an example of a part."""
        part, within = self._place(index)
        return part.region_counts(within)

    @property
    def answered(self) -> bool:
        """Whether every part has answers."""
        return all(part.answered for part in self.parts)

    @property
    def sequential(self) -> bool:
        """Whether a part has to be read in order."""
        return any(part.sequential for part in self.parts)

    @property
    def lengths(self) -> Lengths:
        """The parts' lengths, concatenated."""
        parts = [part.lengths for part in self.parts]
        return parts[0] if len(parts) == 1 else np.concatenate([np.asarray(part, np.int32) for part in parts])

    def warnings(self) -> list[str]:
        """Return the warnings of all parts."""
        return [warning for part in self.parts for warning in part.warnings()]

    def _place(self, index: int) -> tuple[Split, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(torch.searchsorted(self._ends, index, right=True))
        return self.parts[part], index - (int(self._ends[part - 1]) if part else 0)
