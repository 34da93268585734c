"""Readers, which make examples of records and batches of examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from villa.batch import Batch
from villa.datasets.base import Example
from villa.datasets.collation import collate, stack_targets
from villa.datasets.own.pictures import BACKGROUND, PictureStore
from villa.datasets.own.processors import QUESTION, Prompts, append
from villa.datasets.ragged import Integers
from villa.datasets.stores import ImageSource, RegionStore
from villa.datasets.text import KEPT_TEXTS, Texts, TokenCounter, encode_texts, nothing_left
from villa.errors import DataError, one_line

#: Default side of whole images in pixels.
SIDE = 224


class Record(NamedTuple):
    """One question, caption or text of the user's data.

    Attributes:
        id: unique within the split.
        text: the question, caption or first text.
        pair: a second text, or None.
        images: indices of its images in the store.
        target: class index or soft targets ``[labels]``; None without an answer, or if it is to be generated.
        answer: the answer to be generated, or None.
        where: its place in a file, for messages, if known.
        group: name of the group that it belongs to, for metrics of groups, or None.
    """

    id: str
    text: str
    pair: str | None = None
    images: tuple[int, ...] = ()
    target: int | Tensor | None = None
    answer: str | None = None
    where: str = ""
    group: str | None = None


class Reader(ABC):
    """Makes examples of records, and batches of examples; must be picklable for the loader's workers."""

    @abstractmethod
    def open(self, sources: Sequence[ImageSource]) -> Any:
        """Return a store of images or region features of these files; None if no images are read."""

    @abstractmethod
    def text_lengths(self, texts: Sequence[Texts], *, images: bool) -> Integers:
        """Return the numbers of tokens ``[N, 2]`` after and before truncation, of one or two texts a record.

        Args:
            texts: the texts.
            images: whether the records have images.

        Raises:
            DataError: a text cannot be read, or has no tokens.
        """

    @abstractmethod
    def image_length(self, store: Any, image: int) -> int:
        """Return the sequence length that an image adds, for batches by tokens."""

    @abstractmethod
    def example(self, record: Record, store: Any) -> Example:
        """Read one example."""

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Collate examples into a batch."""
        return collate(examples)


class WordPieces:
    """Encodes texts as token ids and, for pairs of texts, types.

    Args:
        tokenizer: the tokenizer.
        max_length: length to truncate to, special tokens included.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self._kept: dict[tuple[str, str | None], tuple[Tensor, Tensor | None]] = {}
        self._count = TokenCounter(tokenizer)

    def lengths(self, texts: Sequence[Texts]) -> Integers:
        """Return the numbers of tokens ``[N, 2]`` after and before truncation, of one or two texts each.

        Raises:
            DataError: see ``encode_texts``.
        """
        whole = self._count(texts)
        return np.stack([np.minimum(whole, self.max_length), whole], 1)

    def __call__(self, text: str, pair: str | None) -> tuple[Tensor, Tensor | None]:
        """Return ids ``[T]`` and, for two texts, types ``[T]``.

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
    """Reads tokens and region features, or tokens alone.

    Args:
        words: encodes texts.
        open_store: returns the region features of files, or None.
    """

    def __init__(self, words: WordPieces, open_store: Callable[[Sequence[ImageSource]], RegionStore | None]) -> None:
        self.words = words
        self._open_store = open_store

    def open(self, sources: Sequence[ImageSource]) -> RegionStore | None:
        """Return the store of region features, which its ``prepare`` makes readable."""
        return self._open_store(sources)

    def text_lengths(self, texts: Sequence[Texts], *, images: bool) -> Integers:
        """Return the numbers of tokens after and before truncation."""
        return self.words.lengths(texts)

    def image_length(self, store: RegionStore | None, image: int) -> int:
        """Return the number of regions."""
        return 0 if store is None else store.regions(image)

    def example(self, record: Record, store: RegionStore | None) -> Example:
        """Read tokens and regions."""
        ids, types = self.words(record.text, record.pair)
        if store is None or not record.images:
            return Example(record.id, ids, types, target=record.target)
        (image,) = record.images
        return Example(record.id, ids, types, *store[image], record.target)


class PixelReader(Reader):
    """Reads tokens and whole images of one size, for models without a processor.

    Args:
        words: encodes texts.
        side: height and width that images are scaled to.
        background: background colour of transparent images.
    """

    def __init__(self, words: WordPieces, side: int, background: str = BACKGROUND) -> None:
        self.words, self.side, self.background = words, side, background

    def open(self, sources: Sequence[ImageSource]) -> PictureStore:
        """Return the images."""
        return PictureStore(sources, self.background)

    def text_lengths(self, texts: Sequence[Texts], *, images: bool) -> Integers:
        """Return the numbers of tokens after and before truncation."""
        return self.words.lengths(texts)

    def image_length(self, store: Any, image: int) -> int:
        """Return 0: all images add the same length."""
        return 0

    def example(self, record: Record, store: PictureStore) -> Example:
        """Read tokens, and images as ``[3, side, side]`` bytes."""
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


#: Kind of target: a label, a text to generate, or a matching pair of image and text.
Kind = Literal["label", "text", "pair"]

_FIELDS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")


@dataclass(frozen=True)
class Reading:
    """Settings of a processor.

    Attributes:
        kind: kind of target.
        max_length: length to truncate to, in tokens; prompts and texts with image placeholders are never truncated.
        padding: pad to the ``longest`` text of a batch, or to ``max_length``; prompts always to the longest.
        prompt: prompt with ``{question}``, or None for the question alone.
        background: background colour of transparent images.
    """

    kind: Kind
    max_length: int
    padding: Literal["longest", "max_length"] = "longest"
    prompt: str | None = None
    background: str = BACKGROUND


class ProcessorReader(Reader):
    """Reads texts and images in collation with the model's own processor.

    Args:
        processor: a transformers processor, or a tokenizer for text only.
        reading: its settings.

    Raises:
        DataError: its tokenizer lacks a token needed for padding or answers.
    """

    def __init__(self, processor: Any, reading: Reading) -> None:
        self.processor, self.reading = processor, reading
        self.prompts = Prompts(processor, reading.prompt)
        self.tokenizer = self.prompts.tokenizer
        ends = (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)
        self._end = next((end for end in ends if end is not None), None)
        if self.tokenizer.pad_token is None or (reading.kind == "text" and self._end is None):
            lacking = "padding" if self.tokenizer.pad_token is None else "end-of-text"
            raise DataError(f"the processor's tokenizer has no {lacking} token; use another dataset.processor")
        self._limit = min(reading.max_length, self.tokenizer.model_max_length)
        self._lengths: dict[tuple[str, str | None], int] = {}

    def open(self, sources: Sequence[ImageSource]) -> PictureStore | None:
        """Return the images."""
        return PictureStore(sources, self.reading.background) if sources else None

    def token_ids(self, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return the token ids of texts, padded only if ``reading.padding`` is ``max_length``."""
        padding = self.reading.padding == "max_length" and self.reading.padding
        options = {"truncation": True, "max_length": self._limit, "padding": padding}
        return tuple(map(tuple, self.tokenizer(list(texts), **options)["input_ids"]))

    def text_lengths(self, texts: Sequence[Texts], *, images: bool) -> Integers:
        """Return the numbers of tokens after and before truncation, image placeholders excluded."""
        return np.array([self._text_length(*each, images=images) for each in texts]).reshape(-1, 2)

    def _text_length(self, text: str, pair: str | None, *, images: bool) -> tuple[int, int]:
        whole = self._lengths.get((text, pair))
        if whole is None:
            filled = text if self.reading.kind == "text" else self._fill_prompt(text)
            whole = len(self.tokenizer(filled, pair, verbose=False)["input_ids"])
            if len(self._lengths) < KEPT_TEXTS:
                self._lengths[text, pair] = whole
        if self.reading.kind == "text" or (self.prompts.marks_images and images):  # never truncated
            return whole, whole
        if not whole:
            raise nothing_left(text)
        return min(whole, self._limit), whole

    def image_length(self, store: Any, image: int) -> int:
        """Return the number of tokens of an image in the text, taken from a small square one."""
        return self.prompts.image_tokens

    def example(self, record: Record, store: PictureStore | None) -> Example:
        """Keep the texts, and decode the images."""
        images = () if store is None else tuple(store[image] for image in record.images)
        reference = None
        if self.reading.kind == "pair" and store is not None and record.images:
            reference = {"image": store.sources[record.images[0]].name, "text": record.text}
        return Example(
            record.id,
            target=record.target,
            reference=reference,
            text=record.text,
            pair=record.pair,
            images=images,
            answer=record.answer,
        )

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Process the examples into a batch.

        Raises:
            DataError: the processor fails, or a prompt is longer than the model's limit.
        """
        try:
            return self._collate_prompts(examples) if self.reading.kind == "text" else self._collate_labels(examples)
        except DataError:
            raise
        except Exception as error:  # the library's processors raise all kinds
            raise DataError(f"the processor cannot read {_named(examples)}: {one_line(error)}") from error

    def _collate_labels(self, examples: Sequence[Example]) -> Batch:
        # Texts with image placeholders are never truncated.
        made = self._prompted(examples) if self.prompts.marks_images and examples[0].images else self._read(examples)
        for example, mask in zip(examples, _mask(made), strict=True):
            if not mask.any():
                raise nothing_left(example.text)
        if self.reading.kind == "pair":
            targets = _matches([example.reference for example in examples])
            return _batch(examples, made, targets=targets, objective="contrastive")
        return _batch(examples, made, targets=stack_targets(examples))

    def _collate_prompts(self, examples: Sequence[Example]) -> Batch:
        made = self._prompted(examples)
        answers = [example.answer for example in examples]
        known = [answer for answer in answers if answer is not None]
        if len(known) < len(answers):
            return _batch(examples, made)
        ids = [[*self.tokenizer(answer, add_special_tokens=False)["input_ids"], self._end] for answer in known]
        made, mask = append(made, ids, self.tokenizer.pad_token_id, self.prompts.answer_type)
        self._check_length(made["input_ids"], examples)
        return _batch(examples, made, answer_mask=mask, targets=made["input_ids"][mask])

    def _prompted(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Process prompts: texts with image placeholders, or for generation."""
        if any(example.pair is not None for example in examples):
            raise DataError(
                f"{_named(examples)} have a text_pair, for which a prompt has no place; put both in one text"
            )
        made = self.prompts.read([example.text for example in examples], [example.images for example in examples])
        self._check_length(made["input_ids"], examples)
        return made

    def _read(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Process texts and, separately, their images."""
        texts, seconds = [self._fill_prompt(e.text) for e in examples], [e.pair for e in examples if e.pair is not None]
        flat = [image for example in examples for image in example.images]
        options = {"truncation": True, "max_length": self._limit, "padding": self.reading.padding}
        options |= {"padding_side": "right", "return_tensors": "pt"}
        if flat and not seconds and len(flat) == len(texts) and hasattr(self.processor, "image_processor"):
            return dict(self.processor(text=texts, images=flat, **options))
        made = dict(self.tokenizer(texts, seconds or None, **options))
        if flat:
            if len({len(example.images) for example in examples}) > 1:
                raise DataError(f"{_named(examples)} have different numbers of images; give all of them as many")
            seen = self._image_processor()(flat, return_tensors="pt")
            made |= {name: _by_example(value, len(texts), len(flat)) for name, value in seen.items()}
        return made

    def _fill_prompt(self, text: str) -> str:
        template = self.reading.prompt
        return text if template is None else template.replace(QUESTION, text)

    def _image_processor(self) -> Any:
        if not hasattr(self.processor, "image_processor"):
            raise DataError("the processor reads texts alone, but the records have images; set dataset.regions=none")
        return self.processor.image_processor

    def _check_length(self, ids: Tensor, examples: Sequence[Example]) -> None:
        limit = self.tokenizer.model_max_length
        if ids.shape[1] > limit:
            raise DataError(
                f"a text among {_named(examples)} has {ids.shape[1]} tokens with its images and answer, but the model "
                f"reads {limit}, and cutting could take an image apart; shorten it, or use smaller images"
            )


def _named(examples: Sequence[Example]) -> str:
    return f"examples '{examples[0].id}' to '{examples[-1].id}'"


def _batch(examples: Sequence[Example], made: Mapping[str, Tensor], **more: Any) -> Batch:
    """Assign a processor's outputs to the fields of a batch."""
    fields: dict[str, Any] = {name: made[name] for name in _FIELDS if name in made}
    if "attention_mask" in fields:
        fields["attention_mask"] = fields["attention_mask"].bool()
    rest = {k: v for k, v in made.items() if k not in (*_FIELDS, "labels") and isinstance(v, Tensor)}
    references = [example.reference for example in examples]
    more["references"] = references if any(references) else None
    return Batch([example.id for example in examples], **fields, inputs=rest or None, **more)


def _mask(made: Mapping[str, Tensor]) -> Tensor:
    return made["attention_mask"] if "attention_mask" in made else torch.ones_like(made["input_ids"])


def _matches(references: Sequence[Mapping[str, str]]) -> Tensor:
    """Return ``[B, B]``, 1 where text j matches image i: the same pair, the same image, or the same text."""
    rows = [
        [float(one["image"] == other["image"] or one["text"] == other["text"]) for other in references]
        for one in references
    ]
    return torch.tensor(rows)


def _by_example(value: Any, examples: int, images: int) -> Any:
    """Reshape ``[B * I, ...]`` to ``[B, I, ...]`` if examples have several images."""
    if not isinstance(value, Tensor) or images == examples or value.shape[0] != images:
        return value
    return value.view(examples, images // examples, *value.shape[1:])
