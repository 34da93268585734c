"""LXMERT's pre-training loss: the sum of all of its objectives on one batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from villa.batch import Batch
from villa.errors import DataError
from villa.losses.base import Direction, Reduction, divergence
from villa.losses.classification import widened
from villa.models.base import ModelOutput
from villa.objectives import asked_parts

#: Target of an unknown answer or region class.
UNKNOWN = -1


def joint_loss(output: ModelOutput, batch: Batch, region_weight: float) -> Tensor:
    """Sum the losses of the parts that ``batch.part_targets`` has targets for.

    ``words`` (masked tokens), ``matched`` (1 if the text matches the image) and ``answers`` (-1 if unknown) are means
    over their targets. ``objects``, ``attributes`` and ``features`` are summed over the masked regions, divided by the
    number of all regions, and weighted; classes are also weighted by the detector's confidence
    (``object_confidence``, ``attribute_confidence``).

    Args:
        output: its extras are the logits by part.
        batch: the targets.
        region_weight: weight of the parts on regions.

    Raises:
        DataError: the batch or the model lacks a part.
    """
    regions = _region_count(batch)
    terms = [
        PARTS[name](output.extras[name], batch) * (region_weight / regions if name in REGION_PARTS else 1)
        for name in _asked(batch, output)
    ]
    return torch.stack(terms).sum()


def joint_consistency(
    output: ModelOutput,
    clean: ModelOutput,
    batch: Batch,
    region_weight: float,
    reduction: Reduction,
    direction: Direction,
) -> Tensor:
    """Sum the divergences of the parts, weighted like their losses.

    Features use the squared difference, averaged over the width; only known answers count.
    """
    regions, terms = _region_count(batch), []
    for name in _asked(batch, output):
        ours, theirs = output.extras[name], clean.extras[name]
        if name == "answers":
            known = _targets(batch, name) != UNKNOWN
            ours, theirs = ours[known], theirs[known]
        if not len(ours):
            continue
        term = F.mse_loss(ours, theirs) if name == "features" else divergence(ours, theirs, reduction, direction)
        terms.append(term * (region_weight * len(ours) / regions if name in REGION_PARTS else 1))
    return torch.stack(terms).sum() if terms else output.logits.sum() * 0


def _classes(name: str) -> Callable[[Tensor, Batch], Tensor]:
    """Return the cross-entropy of logits ``[n, labels]``, averaged over known targets; 0 if none is known."""

    def term(logits: Tensor, batch: Batch) -> Tensor:
        targets = _targets(batch, name)
        total = F.cross_entropy(widened(logits), targets, ignore_index=UNKNOWN, reduction="sum")
        return total / (targets != UNKNOWN).sum().clamp(min=1)

    return term


def _confident_classes(name: str, confidence: str) -> Callable[[Tensor, Batch], Tensor]:
    """Return the cross-entropy of logits ``[M, classes]`` weighted by the detector's confidence, summed."""

    def term(logits: Tensor, batch: Batch) -> Tensor:
        terms = F.cross_entropy(widened(logits), _targets(batch, name), ignore_index=UNKNOWN, reduction="none")
        return (terms * _targets(batch, confidence).to(terms.dtype)).sum()

    return term


def _features(logits: Tensor, batch: Batch) -> Tensor:
    """Return the smooth L1 loss of region features ``[M, D]``, averaged over the width and summed over regions."""
    wide = widened(logits)
    return F.smooth_l1_loss(wide, _targets(batch, "features").to(wide.dtype), reduction="none").mean(1).sum()


#: Loss function of each part.
PARTS: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    "words": _classes("words"),
    "matched": _classes("matched"),
    "objects": _confident_classes("objects", "object_confidence"),
    "attributes": _confident_classes("attributes", "attribute_confidence"),
    "features": _features,
    "answers": _classes("answers"),
}
REGION_PARTS = ("objects", "attributes", "features")


def _asked(batch: Batch, output: ModelOutput) -> list[str]:
    asked = asked_parts(batch)
    lacking = next((name for name in asked if name not in output.extras), None)
    if lacking is not None:
        raise DataError(f"objective 'lxmert' has targets of '{lacking}', but the model has no head for them")
    return asked


def _targets(batch: Batch, name: str) -> Tensor:
    try:
        return (batch.part_targets or {})[name]
    except KeyError:
        raise DataError(f"objective 'lxmert' lacks the targets '{name}'") from None


def _region_count(batch: Batch) -> Tensor | int:
    """Return the number of regions of a batch, masked or not."""
    if batch.region_mask is not None:
        return batch.region_mask.sum()
    return 1 if batch.features is None else batch.features.shape[:-1].numel()
