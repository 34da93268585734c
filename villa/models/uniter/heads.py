"""UNITER's task heads, under their released names."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from villa.models.base import InitialRows
from villa.models.dropout import Dropout
from villa.models.uniter.config import LAYER_NORM_EPS, register_head
from villa.models.uniter.model import Encoded, Uniter, mlp


@register_head("classification")
class UniterForClassification(Uniter):
    """Classification (VQA, SNLI-VE, GQA): logits ``[B, labels]`` from the pooled output."""

    reads = "pooled"

    def add_head(self) -> None:
        """Add ``vqa_output``."""
        self.vqa_output = mlp(self.sizes, nn.GELU(), self.num_labels)

    def score(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Score each row."""
        pooled = self.pooled(encoded)
        return self.vqa_output(pooled), pooled

    def head_prefixes(self) -> tuple[str, ...]:
        """Return the prefix of the head, which has its own learning rate in the release."""
        return ("vqa_output",)


@register_head("multiple_choice")
class UniterForMultipleChoice(Uniter):
    """Multiple choice (VCR): logits ``[B * C, 2]``, a row per choice, whose score is column 1.

    Types are 0 for the question, 1 for the image, 2 for the answer and 3 for the rationale.
    """

    types = 4
    labels = 2
    reads = "pooled"

    def add_head(self) -> None:
        """Add ``vcr_output``."""
        self.vcr_output = mlp(self.sizes, nn.ReLU(), self.num_labels)

    def score(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Score each row."""
        pooled = self.pooled(encoded)
        return self.vcr_output(pooled), pooled

    def head_prefixes(self) -> tuple[str, ...]:
        """Return the prefix of the head, which has its own learning rate in the release."""
        return ("vcr_output",)


@register_head("nlvr2_paired")
class UniterForNlvr2Paired(Uniter):
    """NLVR2 with a row per image: logits ``[B, 2]`` from the concatenated pooled outputs."""

    images = 2
    types = 3
    labels = 2
    reads = "pooled"

    def add_head(self) -> None:
        """Add ``nlvr2_output``."""
        self.nlvr2_output = nn.Linear(2 * self.sizes.hidden_size, self.num_labels)

    def score(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Score each pair of rows."""
        pooled = self.pooled(encoded)
        return self.nlvr2_output(pooled.view(-1, 2 * self.sizes.hidden_size)), pooled


@register_head("nlvr2_triplet")
class UniterForNlvr2Triplet(Uniter):
    """NLVR2 with both images in one row: logits ``[B, 2]`` from its pooled output."""

    images = 2
    joint = True
    types = 3
    labels = 2
    reads = "pooled"

    def add_head(self) -> None:
        """Add ``nlvr2_output``."""
        self.nlvr2_output = nn.Linear(self.sizes.hidden_size, self.num_labels)

    def score(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Score each row."""
        pooled = self.pooled(encoded)
        return self.nlvr2_output(pooled), pooled


@register_head("nlvr2_paired_attn")
class UniterForNlvr2PairedAttention(Uniter):
    """NLVR2 with cross-attention between the rows of both images: logits ``[B, 2]`` from their attention pools."""

    images = 2
    types = 3
    labels = 2

    def add_head(self) -> None:
        """Add ``attn1``, ``attn2``, ``fc``, ``attn_pool`` and ``nlvr2_output``."""
        hidden, heads, rate = self.sizes.hidden_size, self.sizes.num_heads, self.sizes.attention_dropout
        self.attn1 = nn.MultiheadAttention(hidden, heads, dropout=rate, batch_first=True)
        self.attn2 = nn.MultiheadAttention(hidden, heads, dropout=rate, batch_first=True)
        self.fc = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.ReLU(), Dropout(self.sizes.hidden_dropout))
        self.attn_pool = AttentionPool(hidden, rate)
        self.nlvr2_output = nn.Linear(2 * hidden, self.num_labels)

    def score(self, encoded: Encoded) -> tuple[Tensor, None]:
        """Score each pair of rows; the pooler is not used."""
        left, right = encoded.states[-1][0::2], encoded.states[-1][1::2]
        padding = None if encoded.mask is None else ~encoded.mask
        left_padding = None if padding is None else padding[0::2]
        right_padding = None if padding is None else padding[1::2]
        from_right, _ = self.attn1(left, right, right, key_padding_mask=right_padding, need_weights=False)
        from_left, _ = self.attn2(right, left, left, key_padding_mask=left_padding, need_weights=False)
        left = self.attn_pool(self.fc(torch.cat((from_right, left), dim=-1)), left_padding)
        right = self.attn_pool(self.fc(torch.cat((from_left, right), dim=-1)), right_padding)
        return self.nlvr2_output(torch.cat((left, right), dim=-1)), None


class AttentionPool(nn.Module):
    """Average over positions, weighted by a softmax of learned scores.

    Args:
        hidden: width of a position.
        dropout: dropout of the weights.
    """

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(hidden, 1), nn.ReLU())
        self.dropout = Dropout(dropout)

    def forward(self, sequence: Tensor, padding: Tensor | None) -> Tensor:
        """Pool ``[B, L, hidden]`` to ``[B, hidden]``, ignoring positions where ``padding [B, L]`` is True."""
        scores = self.fc(sequence).squeeze(-1)
        if padding is not None:
            scores = scores.masked_fill(padding, -torch.inf)
        weights = self.dropout(scores.softmax(dim=1))
        pooled: Tensor = (weights.unsqueeze(1) @ sequence).squeeze(1)
        return pooled


@register_head("ranking")
class UniterForRanking(Uniter):
    """Ranking (retrieval): logits ``[B, S]``, a score for each of an example's S text-image pairs.

    ``rank_output`` computes them. ``itm_output``, the pre-training head that initialises it, is kept but not used, as
    in the released files.
    """

    images = None
    labels = 1
    reads = "pooled"
    # Row 1 of the pre-training head is "they match". A file that has rank_output keeps its own.
    initial_rows: ClassVar[InitialRows] = {
        "rank_output.weight": ("itm_output.weight", (1,)),
        "rank_output.bias": ("itm_output.bias", (1,)),
    }

    def add_head(self) -> None:
        """Add ``itm_output`` and ``rank_output``."""
        self.itm_output = nn.Linear(self.sizes.hidden_size, 2)
        self.rank_output = nn.Linear(self.sizes.hidden_size, 1)

    def score(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Score each row, grouped by example."""
        pooled = self.pooled(encoded)
        return self.rank_output(pooled).view(encoded.rows.examples, -1), pooled

    def head_prefixes(self) -> tuple[str, ...]:
        """Return the prefix of the head, which has no learning rate of its own in the release."""
        return ("rank_output",)


#: Score of padding regions, as in the release; finite, so that 0 x score is 0 in the KL term.
PADDED_SCORE = -1e4


@register_head("regions")
class UniterForRegions(Uniter):
    """Referring expressions: logits ``[B, R]`` from the last region states by a linear layer (released: ``mlp: 1``)."""

    labels = 1
    reads = "regions"

    def add_head(self) -> None:
        """Add ``re_output``."""
        self.re_output: nn.Module = nn.Linear(self.sizes.hidden_size, 1)

    def score(self, encoded: Encoded) -> tuple[Tensor, None]:
        """Score each region of each row; the pooler is not used."""
        scores: Tensor = self.re_output(encoded.regions).squeeze(-1)
        mask = encoded.rows.region_mask
        return scores if mask is None else scores.masked_fill(~mask, PADDED_SCORE), None

    def head_prefixes(self) -> tuple[str, ...]:
        """Return the prefix of the head, which has its own learning rate in the release."""
        return ("re_output",)


@register_head("regions_mlp")
class UniterForRegionsMlp(UniterForRegions):
    """Referring expressions, scored by two linear layers with GELU and LayerNorm between (released: ``mlp: 2``)."""

    def add_head(self) -> None:
        """Add ``re_output``."""
        hidden = self.sizes.hidden_size
        self.re_output = nn.Sequential(
            nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden, eps=LAYER_NORM_EPS), nn.Linear(hidden, 1)
        )
