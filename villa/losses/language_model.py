"""The loss of models that write their answers."""

from __future__ import annotations

from villa.batch import Batch
from villa.losses.classification import CrossEntropy
from villa.registry import register_loss


@register_loss("language_model")
class LanguageModel(CrossEntropy):
    """Cross-entropy of the answers' tokens, each given those before it; mean over tokens. The prompt has no part in it.

    Logits are ``[N, vocabulary]`` and targets ``[N]``, for the N tokens of ``Batch.answer_mask``.
    """

    def count(self, batch: Batch) -> int:
        """Number of answer tokens."""
        return len(batch) if batch.targets is None else batch.targets.numel()
