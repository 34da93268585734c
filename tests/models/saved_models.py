"""Tiny models in the form that transformers saves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from villa.models.base import Model


def save_random(kind: Any, config: Any, folder: Path) -> dict[str, Tensor]:
    """Save a model of transformers with random weights; return them."""
    torch.manual_seed(5)
    model = kind(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    weights: dict[str, Tensor] = model.state_dict()
    return weights


def assert_read(model: Model, folder: Path, weights: Mapping[str, Tensor], old: Mapping[str, Tensor] | None) -> None:
    """A model takes all its weights from a folder, or from a file of which some tensors are not read any more.

    Args:
        model: built, not loaded.
        folder: where the model of ``weights`` was saved.
        weights: what it is to have then.
        old: what the file holds besides; None reads the folder.
    """
    file = folder / "pytorch_model.bin"
    if old is not None:
        torch.save({**weights, **old}, file)
    report = model.load_weights(str(folder if old is None else file))
    assert report.missing == report.derived == ()
    assert report.unexpected == tuple(old or ())
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
