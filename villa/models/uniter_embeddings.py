"""UNITER's embeddings of word pieces and of image regions, under the released parameter names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from villa.errors import DataError
from villa.models.uniter_sizes import LAYER_NORM_EPS, UniterSizes

#: Columns of UNITER's box geometry: x1, y1, x2, y2, w, h, w * h.
BOX_COLUMNS = 7


def box_geometry(boxes: Tensor) -> Tensor:
    """Complete normalised boxes to the columns x1, y1, x2, y2, w, h, area.

    Widths and heights that are present are kept: the released files round each column to fp16 on its own.

    Args:
        boxes: ``[..., 4]``, ``[..., 6]`` (with w, h) or ``[..., 7]``, as fractions of the image's sides.

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
    """Word, position and type embeddings, summed, normalised and dropped out."""

    def __init__(self, sizes: UniterSizes) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(sizes.vocab_size, sizes.hidden_size, padding_idx=sizes.padding)
        self.position_embeddings = nn.Embedding(sizes.max_positions, sizes.hidden_size)
        self.token_type_embeddings = nn.Embedding(sizes.type_vocab_size, sizes.hidden_size)
        self.LayerNorm = nn.LayerNorm(sizes.hidden_size, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(sizes.hidden_dropout)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """Embed ``[N, T]`` word pieces of types ``[N, T]`` or ``[1, 1]``; return ``[N, T, hidden]``.

        Raises:
            DataError: the text is longer than the model has positions.
        """
        length, positions = input_ids.shape[1], self.position_embeddings.num_embeddings
        if length > positions:
            raise DataError(f"a text has {length} tokens, but the model has {positions} positions: shorten it")
        places = torch.arange(length, device=input_ids.device)
        embedded = self.word_embeddings(input_ids) + self.position_embeddings(places)
        embedded = embedded + self.token_type_embeddings(token_type_ids)
        normalised: Tensor = self.dropout(self.LayerNorm(embedded))
        return normalised


class ImageEmbeddings(nn.Module):
    """Projected region features, box geometry and type embedding, summed, normalised and dropped out."""

    def __init__(self, sizes: UniterSizes) -> None:
        super().__init__()
        self.img_linear = nn.Linear(sizes.feature_dim, sizes.hidden_size)
        self.img_layer_norm = nn.LayerNorm(sizes.hidden_size, eps=LAYER_NORM_EPS)
        self.pos_layer_norm = nn.LayerNorm(sizes.hidden_size, eps=LAYER_NORM_EPS)
        self.pos_linear = nn.Linear(BOX_COLUMNS, sizes.hidden_size)
        self.mask_embedding = nn.Embedding(2, sizes.feature_dim, padding_idx=0)
        self.LayerNorm = nn.LayerNorm(sizes.hidden_size, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(sizes.hidden_dropout)

    def forward(self, features: Tensor, boxes: Tensor, types: Tensor, masked_regions: Tensor | None = None) -> Tensor:
        """Embed the regions of ``N`` images.

        Args:
            features: ``[N, R, feature_dim]``, zero where a region is masked.
            boxes: ``[N, R, 4 | 6 | 7]`` normalised.
            types: type embeddings, ``[N, R, hidden]`` or any shape that broadcasts to it.
            masked_regions: ``[N, R]`` bool; True where row 1 of the mask embedding is added (masked region
                modelling). Row 0 acts as zero whatever it holds.

        Returns:
            ``[N, R, hidden]``.
        """
        if masked_regions is not None:
            features = features + masked_regions.unsqueeze(-1) * self.mask_embedding.weight[1]
        seen = self.img_layer_norm(self.img_linear(features))
        placed = self.pos_layer_norm(self.pos_linear(box_geometry(boxes)))
        normalised: Tensor = self.dropout(self.LayerNorm(seen + placed + types))
        return normalised
