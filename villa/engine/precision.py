"""Autocast and loss scaling."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn

from villa.batch import Batch
from villa.distributed.blocks import modes
from villa.losses.classification import widened
from villa.models.base import Model, ModelOutput

PrecisionName = Literal["fp32", "bf16", "fp16"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Context in which a model is in evaluation mode; afterwards every module is in the mode that it was in."""
    return modes([(module, False) for module in model.modules()])


class Precision:
    """Mixed precision of a run: autocast type and gradient scaler.

    Args:
        name: ``fp32`` (no autocast), ``bf16``, or ``fp16`` with dynamic loss scaling.
        device: where the model runs.
    """

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        self.device = device
        self.dtype = _AUTOCAST.get(name)
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def run(self, model: Model, batch: Batch) -> ModelOutput:
        """Run the model under autocast; logits and the like come in fp32 or wider."""
        with self.autocast():
            output: ModelOutput = model(batch)
        return output.map_scores(widened)

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision as a context; nothing in fp32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    @property
    def loss_scale(self) -> float:
        """The present loss scale; 1 without a scaler."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else 1.0
