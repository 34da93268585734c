"""How texts and images of a record become an example, and examples a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from villa.batch import Batch
from villa.datasets.base import Example
from villa.datasets.collation import collate
from villa.datasets.stores.base import RegionStore, Source
from villa.datasets.stores.pictures import BACKGROUND, PictureStore
from villa.datasets.text import KEPT_TEXTS, TokenCounter, encode_texts
from villa.errors import DataError

#: Side of images that go to a model whole, where the recipe does not say it.
SIDE = 224


@dataclass(frozen=True)
class Record:
    """One question, caption or text, as a user wrote it.

    Attributes:
        id: unique within the split.
        text: the question, caption or first text.
        pair: a second text, or None.
        images: indices of its images in the store.
        target: class index or soft targets ``[labels]``; None when there is no answer, or it is to be written.
        answer: the answer to be written, or None.
        where: its place in a file, for messages, where it is known.
    """

    id: str
    text: str
    pair: str | None = None
    images: tuple[int, ...] = ()
    target: int | Tensor | None = None
    answer: str | None = None
    where: str = ""


class Reader(ABC):
    """Makes examples of records, and batches of examples; goes to the loader's workers."""

    @abstractmethod
    def open(self, sources: Sequence[Source]) -> Any:
        """Return a store of what the images of these files give; None when there are none to read."""

    @abstractmethod
    def text_lengths(self, text: str, pair: str | None, *, images: bool) -> tuple[int, int]:
        """Return how many tokens of a text, or of a pair of texts, are read, and how many it has.

        Args:
            text: the text.
            pair: a second text, or None.
            images: whether it is about images.

        Raises:
            DataError: it cannot be read, or nothing of it is left.
        """

    @abstractmethod
    def image_length(self, store: Any, image: int) -> int:
        """Positions that an image takes in a sequence, as far as they are counted for batches by tokens."""

    @abstractmethod
    def example(self, record: Record, store: Any) -> Example:
        """Read one example."""

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Make a batch of examples."""
        return collate(examples)


class WordPieces:
    """Texts as word-piece ids and, for pairs of texts, types.

    Args:
        tokenizer: text to ids.
        max_length: longest text with its special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self._kept: dict[tuple[str, str | None], tuple[Tensor, Tensor | None]] = {}
        self._count = TokenCounter(tokenizer)

    def lengths(self, text: str, pair: str | None) -> tuple[int, int]:
        """Return how many word-pieces of a text, or of two, are read, and how many there are.

        Raises:
            DataError: see ``encode_texts``.
        """
        whole = self._count(text, pair)
        return min(whole, self.max_length), whole

    def __call__(self, text: str, pair: str | None) -> tuple[Tensor, Tensor | None]:
        """Return ids ``[T]`` and types ``[T]``; no types for one text.

        Raises:
            DataError: see ``encode_texts``.
        """
        found = self._kept.get((text, pair))
        if found is None:
            found = encode_texts(self.tokenizer, text, pair, self.max_length)
            if len(self._kept) < KEPT_TEXTS:
                self._kept[text, pair] = found
        return found


class RegionReader(Reader):
    """Word-pieces and region features, or word-pieces alone.

    Args:
        words: text to ids.
        open_store: gives the region features of files, or None.
    """

    def __init__(self, words: WordPieces, open_store: Callable[[Sequence[Source]], RegionStore | None]) -> None:
        self.words = words
        self._open_store = open_store

    def open(self, sources: Sequence[Source]) -> RegionStore | None:
        """Return the store of region features; they are made ready by its ``prepare``."""
        return self._open_store(sources)

    def text_lengths(self, text: str, pair: str | None, *, images: bool) -> tuple[int, int]:
        """Word-pieces; see the base class."""
        return self.words.lengths(text, pair)

    def image_length(self, store: RegionStore | None, image: int) -> int:
        """Regions."""
        return 0 if store is None else store.regions(image)

    def example(self, record: Record, store: RegionStore | None) -> Example:
        """Read word-pieces and regions."""
        ids, types = self.words(record.text, record.pair)
        if store is None or not record.images:
            return Example(record.id, ids, types, target=record.target)
        (image,) = record.images
        return Example(record.id, ids, types, *store[image], record.target)


class PixelReader(Reader):
    """Word-pieces and whole images of one size, for models without a processor of their own.

    Args:
        words: text to ids.
        side: height and width that images are scaled to.
        background: colour that transparent images are put on.
    """

    def __init__(self, words: WordPieces, side: int, background: str = BACKGROUND) -> None:
        self.words, self.side, self.background = words, side, background

    def open(self, sources: Sequence[Source]) -> PictureStore:
        """Return the images."""
        return PictureStore(sources, self.background)

    def text_lengths(self, text: str, pair: str | None, *, images: bool) -> tuple[int, int]:
        """Word-pieces; see the base class."""
        return self.words.lengths(text, pair)

    def image_length(self, store: Any, image: int) -> int:
        """0: all images take the same number of positions."""
        return 0

    def example(self, record: Record, store: PictureStore) -> Example:
        """Read word-pieces, and images as ``[3, side, side]`` bytes."""
        ids, types = self.words(record.text, record.pair)
        images = tuple(self._pixels(store, image) for image in record.images)
        return Example(record.id, ids, types, target=record.target, images=images)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad the texts; scale the images to [-1, 1].

        Raises:
            DataError: the examples have different numbers of images.
        """
        if len({len(example.images) for example in examples}) > 1:
            raise DataError(f"a batch mixes examples of one and of several images (first: '{examples[0].id}')")
        stacked = torch.stack([torch.stack(example.images) for example in examples]).float() / 127.5 - 1
        pixels = stacked[:, 0] if stacked.shape[1] == 1 else stacked
        return replace(collate(examples), pixel_values=pixels)

    def _pixels(self, store: PictureStore, image: int) -> Tensor:
        scaled = store[image].resize((self.side, self.side))
        return torch.from_numpy(np.array(scaled)).permute(2, 0, 1)
