"""Losses of masked region modelling: features or classes of regions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from villa.batch import Batch
from villa.errors import DataError
from villa.losses.classification import class_indices, widened
from villa.models.base import ModelOutput


def masked_features(output: ModelOutput, batch: Batch) -> Tensor:
    """MRFR: squared error of the masked regions' features, mean over rows and columns of ``logits [M, D]``."""
    logits = widened(output.logits)
    return F.mse_loss(logits, _rows(batch, logits, "features"))


def masked_classes(output: ModelOutput, batch: Batch) -> Tensor:
    """MRC: cross-entropy to the detector's class of each masked region, mean over rows of ``logits [M, classes]``.

    Of a distribution the likeliest class counts, column 0 (background) left out as in the release; class indices are
    taken as they are.
    """
    logits = widened(output.logits)
    if batch.targets is not None and batch.targets.is_floating_point():
        return F.cross_entropy(logits, _rows(batch, logits, "class distributions")[:, 1:].argmax(1) + 1)
    return F.cross_entropy(logits, class_indices(batch, logits))


def masked_distributions(output: ModelOutput, batch: Batch) -> Tensor:
    """MRC-kl: KL(detector || model), mean over rows and columns of ``logits [M, classes]`` as in the release."""
    logits = widened(output.logits)
    return F.kl_div(logits.log_softmax(1), _rows(batch, logits, "class distributions"), reduction="none").mean()


def mean_squared_difference(output: ModelOutput, clean: ModelOutput) -> Tensor:
    """How far two predictions of features are apart: the squared difference, mean over rows and columns."""
    return F.mse_loss(output.logits, clean.logits)


def _rows(batch: Batch, logits: Tensor, what: str) -> Tensor:
    """Floating targets, a row for each row of the logits.

    Raises:
        DataError: there are none, or of another form.
    """
    targets = batch.targets
    if targets is None or not targets.is_floating_point() or targets.shape != logits.shape:
        given = "none" if targets is None else f"{targets.dtype} {list(targets.shape)}"
        raise DataError(
            f"objective '{batch.objective}' needs the {what} of the masked regions, {list(logits.shape)}, as targets "
            f"(given: {given})"
        )
    return targets.to(logits.dtype)
