"""The recipe as it is saved with a model: without what only the machine that trained it has."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from villa.config.schema import CheckpointConfig, PredictConfig, RunConfig
from villa.hub.folder import ITSELF
from villa.models.base import Model

#: Options of a model that are part of its saved configuration, or done with once its weights are saved.
_SETTLED: dict[str, Any] = {"checkpoint": None, "options": {}, "lora_rank": 0}


def portable(config: RunConfig, model: Model) -> RunConfig:
    """Return a run's recipe for a saved folder.

    Paths of data stay, for whoever trains on; those of weights and results go.
    """
    settled: dict[str, Any] = {"checkpoint": None} if model.pretrained() is None else dict(_SETTLED)
    if hasattr(config.model, "architecture"):
        settled["architecture"] = ITSELF
    known = {one.name for one in fields(config.model)}
    return replace(
        config,
        run_type="train_val_test",
        output_dir=f"outputs/{config.name}",
        device="auto",
        model=replace(config.model, **{name: value for name, value in settled.items() if name in known}),
        checkpoint=replace(CheckpointConfig(), every=config.checkpoint.every, keep=config.checkpoint.keep),
        predict=PredictConfig(),
    )
