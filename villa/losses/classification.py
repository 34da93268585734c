"""Losses of classification heads: VQA, SNLI-VE, VCR, NLVR2 and text classification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from villa.batch import Batch
from villa.errors import DataError
from villa.losses.base import Direction, Loss, Reduction, divergence, yes_or_no
from villa.models.base import ModelOutput
from villa.registry import register_loss

_WIDE = (torch.float32, torch.float64)


@register_loss("cross_entropy")
class CrossEntropy(Loss):
    """Cross-entropy on class indices, averaged over rows (VCR, NLVR2; one of two classes per choice).

    For soft targets ``t [rows, labels]`` (VQA's scores) the terms are ``-sum_a t_a log p_a``: the same as with an index
    if one answer is right, and 0 for a row without an answer.
    """

    def forward(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean over the rows of ``logits [rows, labels]``."""
        logits, targets = widened(output.logits), _targets(batch)
        if targets.is_floating_point():
            return F.cross_entropy(logits, _soft(targets, logits))
        return F.cross_entropy(logits, _indices(targets, logits))


@register_loss("binary_cross_entropy")
class BinaryCrossEntropy(Loss):
    """Sigmoid cross-entropy, summed over labels and averaged over examples (VQA, SNLI-VE, GQA).

    Class indices are converted to one-hot targets.
    """

    def forward(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean over examples of the sum over ``labels`` (released: mean x number of answers)."""
        logits = widened(output.logits)
        targets = _targets(batch)
        if not targets.is_floating_point():
            targets = F.one_hot(_indices(targets, logits), logits.shape[-1])
        terms = F.binary_cross_entropy_with_logits(logits, _soft(targets, logits), reduction="none")
        return terms.mean() * logits.shape[-1]

    def consistency(
        self,
        output: ModelOutput,
        clean: ModelOutput,
        batch: Batch,
        reduction: Reduction = "batchmean",
        direction: Direction = "symmetric",
    ) -> Tensor:
        """Return the divergence of softmax over labels, as released; of a single label, that of its sigmoid.

        The softmax of a single logit is always 1, so that its divergence would be 0 and teach nothing.
        """
        if output.logits.shape[-1] > 1:
            return super().consistency(output, clean, batch, reduction, direction)
        return divergence(yes_or_no(output.logits), yes_or_no(clean.logits), reduction, direction)


def class_indices(batch: Batch, logits: Tensor) -> Tensor:
    """Return the target class, int64 ``[rows]``, of each row of ``logits [rows, labels]``.

    Raises:
        DataError: the batch has no targets, or targets of another form.
    """
    targets = _targets(batch)
    if targets.is_floating_point():
        raise DataError("this loss needs class indices, but the targets are soft: use binary_cross_entropy")
    return _indices(targets, logits)


def widened(logits: Tensor) -> Tensor:
    """Return the logits in fp32 or wider."""
    return logits if logits.dtype in _WIDE else logits.to(torch.promote_types(logits.dtype, torch.float32))


def _targets(batch: Batch) -> Tensor:
    if batch.targets is None:
        raise DataError(f"the examples have no targets (first: '{batch.ids[0]}'); a loss needs them")
    return batch.targets


def _soft(targets: Tensor, logits: Tensor) -> Tensor:
    """Return soft targets in the logits' type; both are ``[rows, labels]``."""
    if targets.shape != logits.shape:
        raise DataError(f"soft targets {list(targets.shape)} do not fit logits {list(logits.shape)}")
    return targets.to(logits.dtype)


def _indices(targets: Tensor, logits: Tensor) -> Tensor:
    """Return class indices ``[rows]``, one for each row of ``logits``."""
    if targets.numel() != logits.shape[0]:
        raise DataError(f"class indices {list(targets.shape)} do not fit logits {list(logits.shape)}: one a row")
    return targets.flatten()


@register_loss("language_model")
class LanguageModel(CrossEntropy):
    """Next-token cross-entropy on the answers, averaged over tokens; prompts are not trained on.

    Logits are ``[N, vocabulary]`` and targets ``[N]``, for the N tokens of ``Batch.answer_mask``.
    """

    def count(self, batch: Batch) -> int:
        """Return the number of answer tokens."""
        return len(batch) if batch.targets is None else batch.targets.numel()
