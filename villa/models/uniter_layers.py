"""The transformer layers of UNITER (BERT's post-norm layers), under the released parameter names."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from villa.models.uniter_sizes import LAYER_NORM_EPS, UniterSizes


class SelfAttention(nn.Module):
    """Multi-head self-attention without its output projection."""

    def __init__(self, sizes: UniterSizes) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.dropout = sizes.attention_dropout
        self.query = nn.Linear(sizes.hidden_size, sizes.hidden_size)
        self.key = nn.Linear(sizes.hidden_size, sizes.hidden_size)
        self.value = nn.Linear(sizes.hidden_size, sizes.hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor | None, attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        """Attend within each row.

        Args:
            hidden: ``[N, L, hidden]``.
            mask: ``[N, 1, 1, L]`` bool, True on positions that may be attended to; None for all.
            attentions: compute the maps explicitly and return them; the output stays the same.

        Returns:
            The context ``[N, L, hidden]``, and the maps ``[N, heads, L, L]`` before dropout, or None.
        """
        query, key, value = (self._split(part(hidden)) for part in (self.query, self.key, self.value))
        rate = self.dropout if self.training else 0.0
        maps = _attention_maps(query, key, mask) if attentions else None
        if maps is None:
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate)
        else:
            context = F.dropout(maps, rate) @ value
        return context.transpose(1, 2).flatten(2), maps

    def _split(self, projected: Tensor) -> Tensor:
        """``[N, L, hidden]`` to ``[N, heads, L, hidden / heads]``."""
        rows, length, width = projected.shape
        return projected.view(rows, length, self.num_heads, width // self.num_heads).transpose(1, 2)


def _attention_maps(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1)


class ResidualOutput(nn.Module):
    """Linear map, dropout, residual sum and LayerNorm: the end of both halves of a layer."""

    def __init__(self, width: int, sizes: UniterSizes) -> None:
        super().__init__()
        self.dense = nn.Linear(width, sizes.hidden_size)
        self.LayerNorm = nn.LayerNorm(sizes.hidden_size, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(sizes.hidden_dropout)

    def forward(self, inner: Tensor, residual: Tensor) -> Tensor:
        """Map ``inner [N, L, width]`` and add ``residual [N, L, hidden]``."""
        normalised: Tensor = self.LayerNorm(self.dropout(self.dense(inner)) + residual)
        return normalised


class Attention(nn.Module):
    """Self-attention with its output projection and residual."""

    def __init__(self, sizes: UniterSizes) -> None:
        super().__init__()
        self.self = SelfAttention(sizes)
        self.output = ResidualOutput(sizes.hidden_size, sizes)

    def forward(self, hidden: Tensor, mask: Tensor | None, attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        """As ``SelfAttention.forward``, with the residual added."""
        context, maps = self.self(hidden, mask, attentions)
        return self.output(context, hidden), maps


class Intermediate(nn.Module):
    """The widening linear map of a layer, with the exact (erf) GELU."""

    def __init__(self, sizes: UniterSizes) -> None:
        super().__init__()
        self.dense = nn.Linear(sizes.hidden_size, sizes.intermediate_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[N, L, hidden]`` to ``[N, L, intermediate]``."""
        return F.gelu(self.dense(hidden))


class Layer(nn.Module):
    """One transformer layer."""

    def __init__(self, sizes: UniterSizes) -> None:
        super().__init__()
        self.attention = Attention(sizes)
        self.intermediate = Intermediate(sizes)
        self.output = ResidualOutput(sizes.intermediate_size, sizes)

    def forward(self, hidden: Tensor, mask: Tensor | None, attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        """As ``SelfAttention.forward``, for the whole layer."""
        attended, maps = self.attention(hidden, mask, attentions)
        return self.output(self.intermediate(attended), attended), maps


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, sizes: UniterSizes) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(sizes) for _ in range(sizes.num_layers))

    def forward(
        self, hidden: Tensor, mask: Tensor | None, attentions: bool = False
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Run all layers.

        Args:
            hidden: embedding output, ``[N, L, hidden]``.
            mask: ``[N, L]`` bool, True on real positions; None for all.
            attentions: return the attention maps too.

        Returns:
            The embedding output and the output of every layer; the maps of every layer, or nothing.
        """
        states, maps = [hidden], []
        keys = None if mask is None else mask[:, None, None, :]
        for layer in self.layer:
            hidden, attention = layer(hidden, keys, attentions)
            states.append(hidden)
            if attention is not None:
                maps.append(attention)
        return tuple(states), tuple(maps)


class Pooler(nn.Module):
    """Linear map and tanh of the first position."""

    def __init__(self, sizes: UniterSizes) -> None:
        super().__init__()
        self.dense = nn.Linear(sizes.hidden_size, sizes.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[N, L, hidden]`` to ``[N, hidden]``."""
        return torch.tanh(self.dense(hidden[:, 0]))
