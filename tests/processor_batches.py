"""Batches that processors of transformers make of coloured squares, for the tests of models."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from villa.batch import Batch
from villa.datasets.processor_loading import load_processor

sys.path.insert(0, str(Path(__file__).parents[1] / "projects" / "huggingface"))
import tiny_checkpoints as tiny

GENERATIVE = [name for name, architecture in tiny.ARCHITECTURES.items() if architecture.image_token is not None]
QUESTIONS = ("What shape is it?", "is it red", "color of the square")
ANSWERS = ("square", "no", "dark green")


@cache
def tiny_folder(name: str, parent: Path) -> Path:
    """A tiny checkpoint of an architecture, written once."""
    return tiny.write(name, parent / name)


def pictures(count: int) -> list[Image.Image]:
    """Random pictures."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (48, 48, 3), dtype=np.uint8)) for _ in range(count)]


def processed(name: str, folder: Path) -> dict[str, Any]:
    """What the architecture's processor makes of the questions and as many pictures."""
    processor, architecture = load_processor(folder, local=True), tiny.ARCHITECTURES[name]
    images: list[Any] = list(pictures(len(QUESTIONS)))
    texts = list(QUESTIONS)
    if architecture.chat:
        texts = [processor.apply_chat_template(_messages(text), add_generation_prompt=True) for text in texts]
        images = [[image] for image in images]
    elif architecture.image_token is not None:
        texts = [architecture.image_token + text for text in texts]
    return dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))


def make_batch(name: str, folder: Path) -> Batch:
    """A batch for the architecture's usual task, its answers appended to the prompts of generative ones."""
    made = processed(name, folder)
    made.pop("labels", None)
    ids, mask = made.pop("input_ids"), made.pop("attention_mask").bool()
    types, pixels = made.pop("token_type_ids", None), made.pop("pixel_values")
    count = len(QUESTIONS)
    batch = Batch([str(n) for n in range(count)], ids, mask, types, pixel_values=pixels, inputs=made or None)
    if name in GENERATIVE:
        return _with_answers(batch, load_processor(folder, local=True).tokenizer)
    return batch


def _with_answers(batch: Batch, tokenizer: Any) -> Batch:
    """Append the answers to right-padded prompts."""
    assert batch.input_ids is not None
    assert batch.attention_mask is not None
    answers = [[*tokenizer(a, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for a in ANSWERS]
    kept = [row[mask].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    rows = [prompt + answer for prompt, answer in zip(kept, answers, strict=True)]
    length = max(map(len, rows))

    def pad(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([value + [fill] * (length - len(value)) for value in values])

    def extend(value: torch.Tensor) -> torch.Tensor:
        if value.shape != batch.attention_mask.shape:
            return value
        parts = [v[m].tolist() for v, m in zip(value, batch.attention_mask, strict=True)]
        return pad([part + [0] * len(answer) for part, answer in zip(parts, answers, strict=True)], 0)

    answer_mask = pad([[0] * len(p) + [1] * len(a) for p, a in zip(kept, answers, strict=True)], 0).bool()
    return Batch(
        batch.ids,
        pad(rows, tokenizer.pad_token_id),
        pad([[1] * len(row) for row in rows], 0).bool(),
        None if batch.token_type_ids is None else extend(batch.token_type_ids),
        pixel_values=batch.pixel_values,
        inputs=None if batch.inputs is None else {k: extend(v) for k, v in batch.inputs.items()},
        answer_mask=answer_mask,
        targets=torch.tensor([token for answer in answers for token in answer]),
    )


def _messages(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
