"""Adversarial training for vision-and-language transformers (VILLA, FreeLB and relatives)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from villa.registry import (
    register_attack,
    register_callback,
    register_dataset,
    register_extractor,
    register_loss,
    register_metric,
    register_model,
    register_optimizer,
    register_scheduler,
    register_shift,
    register_submission,
    register_tracker,
    register_trainer,
)

if TYPE_CHECKING:
    from villa.api import Run, demo, extract, from_pretrained, robustness, train

__version__ = "0.1.0"
__all__ = [
    "Run",
    "demo",
    "extract",
    "from_pretrained",
    "register_attack",
    "register_callback",
    "register_dataset",
    "register_extractor",
    "register_loss",
    "register_metric",
    "register_model",
    "register_optimizer",
    "register_scheduler",
    "register_shift",
    "register_submission",
    "register_tracker",
    "register_trainer",
    "robustness",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in (
        "Run",
        "demo",
        "extract",
        "from_pretrained",
        "robustness",
        "train",
    ):  # imported on use: they bring the engine along
        from villa import api

        return getattr(api, name)
    raise AttributeError(f"module 'villa' has no attribute '{name}'")
