"""True or false of a sentence about two images: NLVR2, in the three forms of UNITER.

The left image has type 1 and the right image type 2, unless the type embedding has two rows only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from villa.models.uniter import Encoded, Uniter
from villa.models.uniter_config import register_head


@register_head("nlvr2_paired")
class UniterForNlvr2Paired(Uniter):
    """The sentence is read with each image; logits ``[B, 2]`` from both pooled outputs side by side."""

    images = 2
    types = 3
    labels = 2

    def add_head(self) -> None:
        """Add ``nlvr2_output``."""
        self.nlvr2_output = nn.Linear(2 * self.sizes.hidden_size, self.num_labels)

    def score(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Score each pair of rows."""
        pooled = self.uniter.pooler(encoded.states[-1])
        return self.nlvr2_output(pooled.view(-1, 2 * self.sizes.hidden_size)), pooled


@register_head("nlvr2_triplet")
class UniterForNlvr2Triplet(Uniter):
    """The sentence and both images in one row; logits ``[B, 2]`` from its pooled output."""

    images = 2
    joint = True
    types = 3
    labels = 2

    def add_head(self) -> None:
        """Add ``nlvr2_output``."""
        self.nlvr2_output = nn.Linear(self.sizes.hidden_size, self.num_labels)

    def score(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Score each row."""
        pooled = self.uniter.pooler(encoded.states[-1])
        return self.nlvr2_output(pooled), pooled


@register_head("nlvr2_paired_attn")
class UniterForNlvr2PairedAttention(Uniter):
    """Each image's sequence attends to the other's; logits ``[B, 2]`` from both attention-pooled results."""

    images = 2
    types = 3
    labels = 2

    def add_head(self) -> None:
        """Add ``attn1``, ``attn2``, ``fc``, ``attn_pool`` and ``nlvr2_output``."""
        hidden, heads, rate = self.sizes.hidden_size, self.sizes.num_heads, self.sizes.attention_dropout
        self.attn1 = nn.MultiheadAttention(hidden, heads, dropout=rate, batch_first=True)
        self.attn2 = nn.MultiheadAttention(hidden, heads, dropout=rate, batch_first=True)
        self.fc = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.ReLU(), nn.Dropout(self.sizes.hidden_dropout))
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
    """Mean over positions, weighted by a softmax of learned scores.

    Args:
        hidden: width of a position.
        dropout: dropout of the weights.
    """

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(hidden, 1), nn.ReLU())
        self.dropout = nn.Dropout(dropout)

    def forward(self, sequence: Tensor, padding: Tensor | None) -> Tensor:
        """Pool ``[B, L, hidden]`` to ``[B, hidden]``, leaving out where ``padding [B, L]`` is True."""
        scores = self.fc(sequence).squeeze(-1)
        if padding is not None:
            scores = scores.masked_fill(padding, -torch.inf)
        weights = self.dropout(scores.softmax(dim=1))
        pooled: Tensor = (weights.unsqueeze(1) @ sequence).squeeze(1)
        return pooled
