"""Wrong or right for each choice on its own: VCR."""

from __future__ import annotations

from torch import Tensor, nn

from villa.models.uniter import Encoded, Uniter, mlp
from villa.models.uniter_config import register_head


@register_head("multiple_choice")
class UniterForMultipleChoice(Uniter):
    """Logits ``[B * C, 2]``: one row a choice; a choice's score is its column 1.

    Text types are 0 question, 2 answer, 3 rationale; 1 is the image.
    """

    types = 4
    labels = 2

    def add_head(self) -> None:
        """Add ``vcr_output``."""
        self.vcr_output = mlp(self.sizes, nn.ReLU(), self.num_labels)

    def score(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Score each row."""
        pooled = self.uniter.pooler(encoded.states[-1])
        return self.vcr_output(pooled), pooled

    def head_prefixes(self) -> tuple[str, ...]:
        """The released group with its own learning rate."""
        return ("vcr_output",)
