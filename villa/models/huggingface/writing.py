"""Texts that a generative model reads and writes: which logits count, and greedy decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from villa.batch import Batch
from villa.models.base import Written


def answer_logits(score: Callable[[Tensor], Tensor], answer_mask: Tensor) -> Tensor:
    """Return the logits that predict the answers' tokens.

    Args:
        score: gives the logits ``[B, len(positions), vocabulary]`` of the positions that it is given.
        answer_mask: ``[B, T]``; True on tokens to be predicted, each from the position before it.

    Returns:
        ``[N, vocabulary]``, row by row.
    """
    before = answer_mask[:, 1:]
    positions = before.any(0).nonzero().squeeze(1)
    return score(positions)[before[:, positions]]


def decoder_inputs(batch: Batch, start: int) -> tuple[Tensor, Tensor]:
    """Return what the decoder of an encoder-decoder model reads to write the answers.

    Args:
        batch: right-padded texts with their answers.
        start: id of the token that a decoder starts with.

    Returns:
        Token ids ``[B, A]``, the answers moved by one position, and which of the ``[B, A]`` outputs predict a token.
    """
    ids, marks = batch.input_ids, batch.answer_mask
    assert ids is not None
    assert marks is not None
    counts = marks.sum(1, keepdim=True)
    predicted = torch.arange(int(counts.max()), device=ids.device) < counts
    answers = ids.new_full(predicted.shape, start)
    answers[predicted] = ids[marks]
    return torch.cat((ids.new_full((len(ids), 1), start), answers[:, :-1]), dim=1), predicted


def prompts(batch: Batch, pad: int) -> Batch:
    """Return the batch without its answers, left-padded, as a model continues it.

    Everything that has a value for each token of the text is moved along.

    Args:
        batch: right-padded texts.
        pad: id of the padding token.
    """
    ids = batch.input_ids
    assert ids is not None, "a generative model reads texts"
    real = torch.ones_like(ids, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask.bool()
    kept = real if batch.answer_mask is None else real & ~batch.answer_mask
    length = int(kept.sum(1).max())
    # A stable sort by "is kept" brings the prompt to the end, in its order.
    order = kept.long().sort(dim=1, stable=True).indices[:, ids.shape[1] - length :]
    mask = kept.gather(1, order)

    def move(value: Tensor) -> Tensor:
        if value.dim() < ids.dim() or value.shape[:2] != ids.shape or value.is_floating_point():
            return value
        places, real = (part.view(*part.shape, *[1] * (value.dim() - 2)) for part in (order, mask))
        return value.gather(1, places.expand(*order.shape, *value.shape[2:])) * real

    moved = {name: move(value) for name, value in (batch.inputs or {}).items()}
    return replace(
        batch,
        input_ids=torch.where(mask, ids.gather(1, order), pad),
        attention_mask=mask,
        token_type_ids=None if batch.token_type_ids is None else move(batch.token_type_ids),
        inputs=moved or None,
        answer_mask=None,
        targets=None,
    )


def write(model: Any, arguments: Mapping[str, Any], *, length: int, pad: int) -> Written:
    """Let a model of transformers continue prompts greedily.

    Args:
        model: the model.
        arguments: of its call; left-padded ``input_ids`` among them.
        length: most tokens to write.
        pad: id of the padding token.
    """
    found = model.generate(
        **arguments,
        max_new_tokens=length,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_logits=True,
        use_cache=True,
    )
    steps = torch.stack(found.logits, dim=1).float()
    tokens = found.sequences[:, -steps.shape[1] :]
    ends = torch.as_tensor(_ends(model), device=tokens.device)
    ended = torch.isin(tokens, ends)
    written = ended.cumsum(1) - ended.long() == 0  # up to the first end, which is a token like others
    chances = steps.log_softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2)
    return Written(tokens.masked_fill(~written, -1), (chances * written).sum(1).exp())


def _ends(model: Any) -> list[int]:
    end = model.generation_config.eos_token_id
    if end is None:
        end = model.config.get_text_config().eos_token_id
    return end if isinstance(end, list) else [] if end is None else [end]
