"""Pooled outputs, answer logits and generation for transformers models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from villa.batch import Batch
from villa.facts import Written

#: Tokens and image side of the dummy example that probes the width of a pooled output.
_TOKENS, _SIDE = 4, 224


def pool(output: Any, attention_mask: Tensor | None, *, last: bool) -> Tensor:
    """Return the pooled output ``[B, width]``.

    It is the model's own if it has one; for a dual encoder, both embeddings and their product, concatenated; else the
    state of the first position, or of the last real one.

    Args:
        output: output of a transformers model.
        attention_mask: ``[B, T]``; None when all positions are real.
        last: take the last position, which has seen all others in a causal language model.
    """
    if getattr(output, "image_embeds", None) is not None and getattr(output, "text_embeds", None) is not None:
        image, text = output.image_embeds, output.text_embeds
        return torch.cat((image, text, image * text), dim=-1)
    pooled = getattr(output, "pooler_output", None)
    if isinstance(pooled, Tensor) and pooled.dim() == 2:
        return pooled
    joint = getattr(output, "multimodal_embeddings", None)
    states: Tensor = joint if joint is not None else output.last_hidden_state
    return at_end(states, attention_mask) if last else states[:, 0]


def at_end(values: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return ``values [B, T, ...]`` at the last real position of each row: ``[B, ...]``.

    Args:
        values: values of right- or left-padded texts.
        attention_mask: ``[B, T]``; None when all positions are real.
    """
    if attention_mask is None:
        return values[:, -1]
    positions = torch.arange(attention_mask.shape[1], device=values.device)
    end = (positions * attention_mask.long()).argmax(1)
    return values[torch.arange(len(values), device=values.device), end]


def pooled_size(model: nn.Module, *, last: bool) -> int:
    """Return the width of the pooled output, from a pass over a dummy example or else from the configuration."""
    config = cast("Any", model).config
    text = config.get_text_config()
    if not last:
        try:
            return _probed(model, config)
        except Exception:  # noqa: S110 (not every model can read such an example)
            pass
    return int(getattr(config, "hidden_size", None) or text.hidden_size)


def _probed(model: nn.Module, config: Any) -> int:
    vision = next((getattr(config, n) for n in ("vision_config", "image_config") if hasattr(config, n)), config)
    side = getattr(vision, "image_size", _SIDE)
    side = side if isinstance(side, int) else side[0]
    training, parameter = model.training, next(model.parameters())
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            ids = torch.ones((1, _TOKENS), dtype=torch.long, device=parameter.device)
            pixels = torch.zeros((1, 3, side, side), device=parameter.device)
            output = cast("Any", model)(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
        return pool(output, None, last=False).shape[-1]
    finally:
        model.train(training)


def answer_logits(score: Callable[[Tensor], Tensor], answer_mask: Tensor) -> Tensor:
    """Return the logits that predict the answers' tokens.

    Args:
        score: maps positions to their logits ``[B, len(positions), vocabulary]``.
        answer_mask: ``[B, T]``, True on tokens to predict, each from the position before it.

    Returns:
        ``[N, vocabulary]``, row by row.
    """
    before = answer_mask[:, 1:]
    positions = before.any(0).nonzero().squeeze(1)
    return score(positions)[before[:, positions]]


def decoder_inputs(batch: Batch, start: int) -> tuple[Tensor, Tensor]:
    """Return the decoder inputs of an encoder-decoder model for teacher forcing.

    Args:
        batch: right-padded texts with their answers.
        start: id of the decoder's start token.

    Returns:
        Token ids ``[B, A]``, the answers shifted by one position, and the mask ``[B, A]`` of outputs to be scored.
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
    """Return the batch without its answers, left-padded for generation.

    All inputs that have a value per token are moved along.

    Args:
        batch: right-padded texts.
        pad: id of the padding token.
    """
    ids = batch.input_ids
    assert ids is not None, "a generative model reads texts"
    real = torch.ones_like(ids, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask.bool()
    kept = real if batch.answer_mask is None else real & ~batch.answer_mask
    length = int(kept.sum(1).max())
    # A stable sort by ``kept`` moves the prompt to the end, in its order.
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


def generate(model: Any, arguments: Mapping[str, Any], *, length: int, pad: int) -> Written:
    """Generate continuations of prompts greedily.

    Args:
        model: a transformers model.
        arguments: inputs, left-padded ``input_ids`` among them.
        length: maximum number of tokens to generate.
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
    kept = ended.cumsum(1) - ended.long() == 0  # up to the first end-of-text token, which is included
    chances = steps.log_softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2)
    return Written(tokens.masked_fill(~kept, -1), (chances * kept).sum(1).exp())


def _ends(model: Any) -> list[int]:
    end = model.generation_config.eos_token_id
    if end is None:
        end = model.config.get_text_config().eos_token_id
    return end if isinstance(end, list) else [] if end is None else [end]
