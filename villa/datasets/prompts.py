"""Prompts for models that write, and the answers that they learn to write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def build(processor: Any, template: str | None, questions: Sequence[tuple[str, int]]) -> list[str]:
    """Return the texts that a processor is given, with the places of images marked as it wants them.

    Args:
        processor: of transformers. Its chat template is used where it has one; otherwise the text is its image token
            for each image, and what is asked.
        template: what is asked, with ``{question}`` for the question, and perhaps ``{image}`` where the images are
            to be (not in a chat, which has a place for them); None asks the question.
        questions: the questions and how many images each has.
    """
    asked = [(template or "{question}").replace("{question}", question) for question, _ in questions]
    counts = [count for _, count in questions]
    tokenizer = getattr(processor, "tokenizer", processor)
    chat = next((p for p in (processor, tokenizer) if getattr(p, "chat_template", None)), None)
    if chat is not None:
        messages = [_message(text, count) for text, count in zip(asked, counts, strict=True)]
        return [chat.apply_chat_template([m], add_generation_prompt=True, tokenize=False) for m in messages]
    token = getattr(processor, "image_token", None) or ""
    return [_marked(text, str(token) * count) for text, count in zip(asked, counts, strict=True)]


def append(made: Mapping[str, Tensor], answers: Sequence[Sequence[int]], pad: int) -> tuple[dict[str, Tensor], Tensor]:
    """Append answers to the prompts that a processor made, token by token, so that prompts are as in prediction.

    Args:
        made: ``input_ids [B, T]``, right-padded, and other tensors; those with a value for each token are extended.
        answers: token ids of every answer.
        pad: id of the padding token.

    Returns:
        The extended tensors, and a mask ``[B, T']`` of the answers' tokens.
    """
    ids = made["input_ids"]
    mask = made.get("attention_mask", torch.ones_like(ids))
    lengths = mask.sum(1).tolist()
    total = max(length + len(answer) for length, answer in zip(lengths, answers, strict=True))
    marks = torch.zeros(len(ids), total, dtype=torch.bool)
    for row, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
        marks[row, length : length + len(answer)] = True
    written = torch.tensor([token for answer in answers for token in answer], dtype=ids.dtype)
    extended = dict(made)
    for name, value in made.items():
        if isinstance(value, Tensor) and value.shape == ids.shape:
            extended[name] = _extended(name, value, mask.bool(), marks, written, pad)
    return extended, marks


def _extended(name: str, value: Tensor, real: Tensor, marks: Tensor, written: Tensor, pad: int) -> Tensor:
    fill = pad if name == "input_ids" else 0
    longer = value.new_full(marks.shape, fill)
    width = min(value.shape[1], marks.shape[1])
    longer[:, :width] = value.masked_fill(~real, fill)[:, :width]
    if name == "input_ids":
        longer[marks] = written
    else:
        longer[marks] = {"attention_mask": 1, "token_type_ids": _answer_type(value)}.get(name, 0)
    return longer


def _answer_type(prompt_types: Tensor) -> int:
    """Type of an answer's tokens: that of text, or 1 behind a prefix that is of type 0 with its images (PaliGemma)."""
    return 0 if bool(prompt_types.any()) else 1


def _message(text: str, images: int) -> dict[str, Any]:
    return {"role": "user", "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}


def _marked(text: str, images: str) -> str:
    if "{image}" in text:
        return text.replace("{image}", images)
    return f"{images}{text}"
