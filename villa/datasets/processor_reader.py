"""Texts and images read by a model's own processor (its tokenizer and image processor in the transformers library)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from villa.batch import Batch
from villa.datasets import prompts
from villa.datasets.base import Example
from villa.datasets.collation import stack_targets
from villa.datasets.reader import Reader, Record
from villa.datasets.stores.base import Source
from villa.datasets.stores.pictures import PictureStore
from villa.errors import DataError
from villa.plugins import one_line

#: What is asked of a model: a label, a text that it writes, or whether an image and a text belong together.
Kind = Literal["label", "text", "pair"]

_FIELDS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
#: A tokenizer without a limit of its own says a number like 1e30.
_NO_LIMIT = 10**6


@dataclass(frozen=True)
class Reading:
    """How a processor is used.

    Attributes:
        kind: what is asked of the model.
        max_length: longest text in tokens; not for texts to be continued, which are never cut.
        padding: to the ``longest`` text of a batch, or to ``max_length``.
        prompt: what a model is told in place of the question alone; holds ``{question}``.
    """

    kind: Kind
    max_length: int
    padding: Literal["longest", "max_length"] = "longest"
    prompt: str | None = None


class ProcessorReader(Reader):
    """Reads texts and images in collation, so that a batch is what the model's own processor makes of them.

    Args:
        processor: of transformers; a tokenizer for texts alone.
        reading: how it is used.
    """

    def __init__(self, processor: Any, reading: Reading) -> None:
        self.processor, self.reading = processor, reading
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def open(self, sources: Sequence[Source]) -> PictureStore | None:
        """Return the images."""
        return PictureStore(sources) if sources else None

    def text_length(self, text: str, pair: str | None) -> int:
        """Tokens of the text, without what stands for images."""
        return min(len(self.tokenizer(text, pair)["input_ids"]), self.reading.max_length)

    def image_length(self, store: Any, image: int) -> int:
        """0: what an image becomes is known when it is read."""
        return 0

    def example(self, record: Record, store: PictureStore | None) -> Example:
        """Keep the texts, and decode the images."""
        images = () if store is None else tuple(store[image] for image in record.images)
        pair = self.reading.kind == "pair" and store is not None
        reference = (
            {"image": str(store.sources[record.images[0]].path), "text": record.text} if pair and store else None
        )
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
        """Let the processor read the examples.

        Raises:
            DataError: it cannot, or a prompt is longer than the model's limit.
        """
        try:
            return self._written(examples) if self.reading.kind == "text" else self._scored(examples)
        except DataError:
            raise
        except Exception as error:  # whatever the processors of the library raise for what they do not expect
            names = f"'{examples[0].id}' to '{examples[-1].id}'"
            raise DataError(f"the processor cannot read examples {names}: {one_line(error)}") from error

    def _scored(self, examples: Sequence[Example]) -> Batch:
        made = self._read([e.text for e in examples], [e.pair for e in examples], [e.images for e in examples])
        references = [example.reference for example in examples]
        targets = stack_targets(examples)
        if self.reading.kind == "pair":
            targets = _matches(references)
        return _batch(examples, made, targets=targets, references=references if any(references) else None)

    def _written(self, examples: Sequence[Example]) -> Batch:
        images = [list(example.images) for example in examples]
        texts = prompts.build(self.processor, self.reading.prompt, [(e.text, len(e.images)) for e in examples])
        given = {"images": images} if any(images) else {}
        made = dict((self.processor if images[0] else self.tokenizer)(text=texts, **given, **self._options(cut=False)))
        self._check_length(made["input_ids"], examples)
        answers = [example.answer for example in examples]
        known = [answer for answer in answers if answer is not None]
        if len(known) < len(answers):
            return _batch(examples, made)
        ids = [[*self.tokenizer(a, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id] for a in known]
        made, mask = prompts.append(made, ids, self.tokenizer.pad_token_id)
        return _batch(examples, made, answer_mask=mask, targets=made["input_ids"][mask])

    def _read(self, texts: list[str], pairs: list[str | None], images: Sequence[tuple[Any, ...]]) -> dict[str, Tensor]:
        seconds = [pair for pair in pairs if pair is not None]
        flat, options = [image for each in images for image in each], self._options(cut=True)
        if flat and not seconds and len(flat) == len(texts) and hasattr(self.processor, "image_processor"):
            return dict(self.processor(text=texts, images=flat, **options))
        made = dict(self.tokenizer(texts, seconds or None, **options))
        if flat:
            seen = self._image_processor()(flat, return_tensors="pt")
            made |= {name: _by_example(value, len(texts), len(flat)) for name, value in seen.items()}
        return made

    def _options(self, *, cut: bool) -> dict[str, Any]:
        options: dict[str, Any] = {"return_tensors": "pt", "padding": self.reading.padding}
        return options | ({"truncation": True, "max_length": self.reading.max_length} if cut else {"padding": True})

    def _image_processor(self) -> Any:
        if not hasattr(self.processor, "image_processor"):
            raise DataError("the processor reads texts alone, but the records have images; set dataset.regions=none")
        return self.processor.image_processor

    def _check_length(self, ids: Tensor, examples: Sequence[Example]) -> None:
        limit = self.tokenizer.model_max_length
        if limit < _NO_LIMIT and ids.shape[1] > limit:
            raise DataError(
                f"a prompt among '{examples[0].id}' to '{examples[-1].id}' has {ids.shape[1]} tokens with its images, "
                f"but the model reads {limit}; shorten dataset.prompt or the questions, or use smaller images"
            )


def _batch(examples: Sequence[Example], made: Mapping[str, Tensor], **more: Any) -> Batch:
    """Sort what a processor made into the fields of a batch."""
    fields: dict[str, Any] = {name: made[name] for name in _FIELDS if name in made}
    if "attention_mask" in fields:
        fields["attention_mask"] = fields["attention_mask"].bool()
    rest = {k: v for k, v in made.items() if k not in (*_FIELDS, "labels") and isinstance(v, Tensor)}
    return Batch([example.id for example in examples], **fields, inputs=rest or None, **more)


def _matches(references: Sequence[Mapping[str, str]]) -> Tensor:
    """``[B, B]``: 1 where text j is about image i: a pair of the data, the same image, or the same text."""
    rows = [
        [float(one["image"] == other["image"] or one["text"] == other["text"]) for other in references]
        for one in references
    ]
    return torch.tensor(rows)


def _by_example(value: Any, examples: int, images: int) -> Any:
    """``[B * I, ...]`` as ``[B, I, ...]`` where an example has several images."""
    if not isinstance(value, Tensor) or images == examples or value.shape[0] != images:
        return value
    return value.view(examples, images // examples, *value.shape[1:])
