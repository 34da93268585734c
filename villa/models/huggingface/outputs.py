"""One vector an example, from whatever a model of transformers returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from villa.batch import Batch
from villa.facts import Written

#: Tokens and side of the made-up example that tells the width of a pooled output.
_TOKENS, _SIDE = 4, 224


def pool(output: Any, attention_mask: Tensor | None, *, last: bool) -> Tensor:
    """Return the pooled output ``[B, width]``.

    It is the model's own where it has one; of a dual encoder, both embeddings and their product side by side; else
    the state of the first position, or of the last real one.

    Args:
        output: what a model of transformers returned.
        attention_mask: ``[B, T]``, for the last real position; None when all are.
        last: states look back only (language models), so that the last one has seen all.
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
    """Return what ``values [B, T, ...]`` hold at the last real position of each row: ``[B, ...]``.

    Args:
        values: of right- or left-padded texts.
        attention_mask: ``[B, T]``; None when all positions are real.
    """
    if attention_mask is None:
        return values[:, -1]
    positions = torch.arange(attention_mask.shape[1], device=values.device)
    end = (positions * attention_mask.long()).argmax(1)
    return values[torch.arange(len(values), device=values.device), end]


def pooled_size(model: nn.Module, *, last: bool) -> int:
    """Return the width of the pooled output, found by a pass over a made-up example or else from the configuration."""
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
