"""Perturbations without hooks: other modules in place of those that are perturbed."""

from __future__ import annotations

from typing import Any

import torch
from tiny import RecordingPasses
from torch import Tensor, nn

from villa.batch import Batch
from villa.losses.base import Loss
from villa.models.huggingface.model import HuggingFaceModel
from villa.trainers.villa import VillaConfig, VillaTrainer


class Plus(nn.Module):
    """A module with something added to its output, or to one of its keyword arguments."""

    def __init__(self, inner: nn.Module, delta: Tensor, argument: str | None) -> None:
        super().__init__()
        self.inner, self.delta, self.argument = inner, delta, argument

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *values: Any, **named: Any) -> Any:
        if self.argument is not None:
            return self.inner(*values, **named | {self.argument: named[self.argument] + self.delta})
        value = self.inner(*values, **named)
        return value + (self.delta.transpose(1, 2).reshape(value.shape) if value.dim() > 3 else self.delta)


def score(model: HuggingFaceModel, batch: Batch, **deltas: Tensor) -> Tensor:
    """The logits of the model with other modules in place of those that are perturbed."""
    points = model.perturbation_points()
    # The inner module first: the word embedding may lie below the language model.
    places = sorted(deltas, key=lambda modality: -points[modality].module.count("."))
    originals = {}
    for modality in places:
        parent, _, child = points[modality].module.rpartition(".")
        originals[modality] = model.get_submodule(points[modality].module)
        setattr(
            model.get_submodule(parent), child, Plus(originals[modality], deltas[modality], points[modality].argument)
        )
    try:
        return model(batch).logits
    finally:
        for modality in reversed(places):
            parent, _, child = points[modality].module.rpartition(".")
            setattr(model.get_submodule(parent), child, originals[modality])


def shapes(model: HuggingFaceModel, batch: Batch, loss: Loss) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Where each modality may be perturbed, and the width there."""
    passes = RecordingPasses(model, loss)
    VillaTrainer(VillaConfig(steps=1, modality="both")).step(batch, passes)
    model.zero_grad()
    deltas = passes.used[-1]
    masks = {}
    for modality, point in model.perturbation_points().items():
        mask = point.mask(batch)
        masks[modality] = torch.ones(deltas[modality].shape[:2], dtype=torch.bool) if mask is None else mask
    return masks, {modality: delta.shape[2] for modality, delta in deltas.items()}
