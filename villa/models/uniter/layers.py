"""The transformer layers of UNITER (BERT's post-norm layers), under the released parameter names."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from villa.errors import DataError
from villa.models.dropout import Dropout, draws_slowly, dropout
from villa.models.packing import Blocks, Packing, Selection
from villa.models.uniter.config import LAYER_NORM_EPS, UniterSizes


class SelfAttention(nn.Module):
    """Multi-head self-attention without its output projection."""

    def __init__(self, sizes: UniterSizes) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.dropout = sizes.attention_dropout
        self.query = nn.Linear(sizes.hidden_size, sizes.hidden_size)
        self.key = nn.Linear(sizes.hidden_size, sizes.hidden_size)
        self.value = nn.Linear(sizes.hidden_size, sizes.hidden_size)

    def forward(
        self, asking: Tensor, hidden: Tensor, queries: Blocks, keys: Blocks, mask: Tensor | None, attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within each row.

        Args:
            asking: ``[Q, hidden]`` positions that attend.
            hidden: ``[P, hidden]`` positions that are attended to.
            queries: rows of ``asking``.
            keys: rows of ``hidden``, of length L.
            mask: ``[N, 1, 1, L]`` bool, True on positions that may be attended to; None for all.
            attentions: compute the attention maps explicitly and return them; the context is the same.

        Returns:
            The context ``[Q, hidden]``, and the maps ``[N, heads, queries, L]`` before dropout, or None.
        """
        query = self._split(queries.spread(self.query(asking)))
        key, value = (self._split(keys.spread(part(hidden))) for part in (self.key, self.value))
        rate = self.dropout if self.training else 0.0
        if attentions or (rate and draws_slowly(query.device)):
            maps = _attention_maps(query, key, mask)
            context = dropout(maps, rate) @ value
        else:
            maps = None
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate)
        return queries.collect(context.transpose(1, 2).flatten(2)), maps if attentions else None

    def _split(self, projected: Tensor) -> Tensor:
        """Reshape ``[N, L, hidden]`` to ``[N, heads, L, hidden / heads]``."""
        return projected.view(*projected.shape[:2], self.num_heads, -1).transpose(1, 2)


def _attention_maps(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1)


class ResidualOutput(nn.Module):
    """Linear layer, dropout, residual sum and LayerNorm: the end of both sublayers."""

    def __init__(self, width: int, sizes: UniterSizes) -> None:
        super().__init__()
        self.dense = nn.Linear(width, sizes.hidden_size)
        self.LayerNorm = nn.LayerNorm(sizes.hidden_size, eps=LAYER_NORM_EPS)
        self.dropout = Dropout(sizes.hidden_dropout)

    def forward(self, inner: Tensor, residual: Tensor) -> Tensor:
        """Map ``inner [P, width]`` and add ``residual [P, hidden]``."""
        normalised: Tensor = self.LayerNorm(self.dropout(self.dense(inner)) + residual)
        return normalised


class Attention(nn.Module):
    """Self-attention with its output projection and residual."""

    def __init__(self, sizes: UniterSizes) -> None:
        super().__init__()
        self.self = SelfAttention(sizes)
        self.output = ResidualOutput(sizes.hidden_size, sizes)

    def forward(
        self, hidden: Tensor, keys: Blocks, mask: Tensor | None, selection: Selection | None, attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run self-attention, its projection and the residual; see ``Layer.forward``."""
        asking, queries = hidden, keys
        if selection is not None:
            asking, queries = hidden.index_select(0, selection.chosen), selection.blocks
        context, maps = self.self(asking, hidden, queries, keys, mask, attentions)
        return self.output(context, asking), maps


class Intermediate(nn.Module):
    """The first linear layer of the feed-forward sublayer, with the exact (erf) GELU."""

    def __init__(self, sizes: UniterSizes) -> None:
        super().__init__()
        self.dense = nn.Linear(sizes.hidden_size, sizes.intermediate_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``[P, hidden]`` to ``[P, intermediate]``."""
        return F.gelu(self.dense(hidden))


class Layer(nn.Module):
    """One transformer layer."""

    def __init__(self, sizes: UniterSizes) -> None:
        super().__init__()
        self.attention = Attention(sizes)
        self.intermediate = Intermediate(sizes)
        self.output = ResidualOutput(sizes.intermediate_size, sizes)

    def forward(
        self,
        hidden: Tensor,
        keys: Blocks,
        mask: Tensor | None,
        selection: Selection | None = None,
        attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the layer.

        Args:
            hidden: ``[P, hidden]``.
            keys: the positions' rows, of length L.
            mask: ``[N, 1, 1, L]`` bool, True on real positions; None for all.
            selection: the Q positions to compute; None for all.
            attentions: return the attention maps too.

        Returns:
            ``[Q, hidden]``, and the maps ``[N, heads, queries, L]`` before dropout, or None.
        """
        attended, maps = self.attention(hidden, keys, mask, selection, attentions)
        return self.output(self.intermediate(attended), attended), maps


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, sizes: UniterSizes) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(sizes) for _ in range(sizes.num_layers))

    def forward(
        self, hidden: Tensor, packing: Packing, *, whole: bool = True, attentions: bool = False
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Run all layers.

        Args:
            hidden: embedding output, ``[P, hidden]``.
            packing: the positions.
            whole: run the last layer on all positions, and not just on those that the head reads.
            attentions: return the attention maps too.

        Returns:
            The embedding output followed by the output of every layer; the maps of every layer, or nothing.
        """
        states, maps = [hidden], []
        mask = None if packing.mask is None else packing.mask[:, None, None, :]
        for number, layer in enumerate(self.layer, start=1):
            selection = packing.selection if number == len(self.layer) and not whole else None
            hidden, attention = layer(hidden, packing.blocks, mask, selection, attentions)
            states.append(hidden)
            if attention is not None:
                maps.append(attention)
        return tuple(states), tuple(maps)


class Pooler(nn.Module):
    """Linear layer and tanh on the first position."""

    def __init__(self, sizes: UniterSizes) -> None:
        super().__init__()
        self.dense = nn.Linear(sizes.hidden_size, sizes.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Pool ``[N, L, hidden]`` to ``[N, hidden]``."""
        return torch.tanh(self.dense(hidden[:, 0]))


#: Columns of UNITER's box geometry: x1, y1, x2, y2, w, h, w * h.
BOX_COLUMNS = 7


def box_geometry(boxes: Tensor) -> Tensor:
    """Complete normalised boxes to the columns x1, y1, x2, y2, w, h, area.

    Given widths and heights are kept, because the released files round each column to fp16 separately.

    Args:
        boxes: ``[..., 4]``, ``[..., 6]`` (with w, h) or ``[..., 7]``, as fractions of the image size.

    Returns:
        ``[..., 7]``.

    Raises:
        DataError: another number of columns.
    """
    columns = boxes.shape[-1]
    if columns not in (4, 6, BOX_COLUMNS):
        raise DataError(
            f"boxes have {columns} columns; UNITER reads 4 (x1, y1, x2, y2), 6 (with w, h) or 7 (with area)"
        )
    if columns == 4:
        boxes = torch.cat((boxes, boxes[..., 2:4] - boxes[..., 0:2]), dim=-1)
    if boxes.shape[-1] == 6:
        boxes = torch.cat((boxes, boxes[..., 4:5] * boxes[..., 5:6]), dim=-1)
    return boxes


class TextEmbeddings(nn.Module):
    """Sum of word, position and type embeddings, with LayerNorm."""

    def __init__(self, sizes: UniterSizes) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(sizes.vocab_size, sizes.hidden_size, padding_idx=sizes.padding)
        self.position_embeddings = nn.Embedding(sizes.max_positions, sizes.hidden_size)
        self.token_type_embeddings = nn.Embedding(sizes.type_vocab_size, sizes.hidden_size)
        self.LayerNorm = nn.LayerNorm(sizes.hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """Embed ``[N, T]`` tokens with types ``[N, T]`` or ``[1, 1]``; return ``[N, T, hidden]``.

        Raises:
            DataError: the text is longer than ``max_positions``.
        """
        length, positions = input_ids.shape[1], self.position_embeddings.num_embeddings
        if length > positions:
            raise DataError(f"a text has {length} tokens, but the model has {positions} positions: shorten it")
        places = torch.arange(length, device=input_ids.device)
        embedded = self.word_embeddings(input_ids) + self.position_embeddings(places)
        embedded = embedded + self.token_type_embeddings(token_type_ids)
        normalised: Tensor = self.LayerNorm(embedded)
        return normalised


class ImageEmbeddings(nn.Module):
    """Sum of projected region features, projected box geometry and type embedding, with LayerNorm."""

    def __init__(self, sizes: UniterSizes) -> None:
        super().__init__()
        self.img_linear = nn.Linear(sizes.feature_dim, sizes.hidden_size)
        self.img_layer_norm = nn.LayerNorm(sizes.hidden_size, eps=LAYER_NORM_EPS)
        self.pos_layer_norm = nn.LayerNorm(sizes.hidden_size, eps=LAYER_NORM_EPS)
        self.pos_linear = nn.Linear(BOX_COLUMNS, sizes.hidden_size)
        self.mask_embedding = nn.Embedding(2, sizes.feature_dim, padding_idx=0)
        self.LayerNorm = nn.LayerNorm(sizes.hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, features: Tensor, boxes: Tensor, types: Tensor, masked_regions: Tensor | None = None) -> Tensor:
        """Embed the regions of ``N`` images.

        Args:
            features: ``[N, R, feature_dim]``, zero where a region is masked.
            boxes: ``[N, R, 4 | 6 | 7]`` normalised.
            types: type embeddings, ``[N, R, hidden]`` or a shape that broadcasts to it.
            masked_regions: ``[N, R]`` bool, True where row 1 of the mask embedding is added (masked region
                modelling). Row 0 is treated as zero whatever it holds.

        Returns:
            ``[N, R, hidden]``.
        """
        if masked_regions is not None:
            features = features + masked_regions.unsqueeze(-1) * self.mask_embedding.weight[1]
        seen = self.img_layer_norm(self.img_linear(features))
        placed = self.pos_layer_norm(self.pos_linear(box_geometry(boxes)))
        normalised: Tensor = self.LayerNorm(seen + placed + types)
        return normalised
