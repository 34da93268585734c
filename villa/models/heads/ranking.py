"""How well a text and an image go together: image-text retrieval."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from villa.models.base import InitialRows
from villa.models.uniter import Encoded, Uniter
from villa.models.uniter_config import register_head


@register_head("ranking")
class UniterForRanking(Uniter):
    """Logits ``[B, S]``: a score for each of an example's S pairs of a text and an image.

    ``rank_output`` scores; ``itm_output``, the pre-training head that it starts from, is kept beside it and not used,
    as in the released files.
    """

    images = None
    labels = 1
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
        """Score each row, the rows of an example side by side."""
        pooled = self.uniter.pooler(encoded.states[-1])
        return self.rank_output(pooled).view(encoded.rows.examples, -1), pooled

    def head_prefixes(self) -> tuple[str, ...]:
        """The head; the release gives it no learning rate of its own."""
        return ("rank_output",)
