"""What a perturbation does at the points of a model, whatever the model is."""

from collections.abc import Mapping

import torch

from villa.adversarial.ascent import AscentSettings
from villa.adversarial.injection import inject
from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.models.base import Model


def assert_points_move_logits(model: Model, batch: Batch, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Each modality's perturbation has its shape, moves the logits, and exists and learns where tokens are alone."""
    clean = model(batch).logits
    for modality, shape in shapes.items():
        perturbation = Perturbation(AscentSettings(step_size=0.1, init="normal", init_scale=1.0))
        mask = model.perturbation_points()[modality].mask(batch)
        with inject(model, model.perturbation_points(), {modality: perturbation}, batch):
            moved = model(batch).logits
        assert not torch.allclose(moved, clean, atol=1e-3)
        moved.sum().backward()
        assert mask is not None
        assert perturbation.delta is not None
        assert perturbation.delta.grad is not None
        assert perturbation.delta.shape == shape
        assert 0 < mask.sum() < mask.numel()
        assert (perturbation.delta[~mask] == 0).all()
        assert (perturbation.delta.grad[~mask] == 0).all()
        assert (perturbation.delta.grad[mask].abs().sum(-1) > 0).all()
