"""Tiny models in the form that transformers saves."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def save_random(kind: Any, config: Any, folder: Path) -> dict[str, Tensor]:
    """Save a model of transformers with random weights; return them."""
    torch.manual_seed(5)
    model = kind(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    weights: dict[str, Tensor] = model.state_dict()
    return weights
