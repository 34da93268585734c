"""Scores for each of a fixed set of answers: VQA, SNLI-VE, GQA."""

from __future__ import annotations

from torch import Tensor, nn

from villa.models.uniter import Encoded, Uniter, mlp
from villa.models.uniter_config import register_head


@register_head("classification")
class UniterForClassification(Uniter):
    """Logits ``[B, labels]`` from the pooled output."""

    def add_head(self) -> None:
        """Add ``vqa_output``."""
        self.vqa_output = mlp(self.sizes, nn.GELU(), self.num_labels)

    def score(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Score each row."""
        pooled = self.uniter.pooler(encoded.states[-1])
        return self.vqa_output(pooled), pooled

    def head_prefixes(self) -> tuple[str, ...]:
        """The released group with its own learning rate."""
        return ("vqa_output",)
