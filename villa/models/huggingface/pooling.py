"""One vector an example, from whatever a model of transformers returns."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

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
