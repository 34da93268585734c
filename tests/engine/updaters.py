"""Updaters of the tiny model, and its batch cut into micro-batches."""

from collections.abc import Sequence
from typing import Any

import torch
from tiny import CPU
from torch import Tensor

from villa.batch import Batch
from villa.config.schema import TrainingConfig
from villa.engine.parameter_groups import parameter_groups
from villa.engine.passes import ModelPasses, Precision
from villa.engine.schedules import ConstantSchedule, ScheduleConfig
from villa.engine.updater import Updater
from villa.losses.base import Loss
from villa.losses.classification import CrossEntropy
from villa.models.base import Model
from villa.registry import OPTIMIZERS
from villa.trainers.base import Trainer
from villa.trainers.standard import StandardTrainer


def descent(model: Model, **options: Any) -> torch.optim.Optimizer:
    """Plain gradient descent, which shows the gradients in the parameters."""
    return torch.optim.SGD(parameter_groups(model, lr=1.0, weight_decay=0.0, **options), lr=1.0)


def adamw(model: Model, **options: Any) -> torch.optim.Optimizer:
    """AdamW with a learning rate of 0.01."""
    factory = OPTIMIZERS.get("adamw")
    optimizer: torch.optim.Optimizer = factory(factory.Config(name="adamw", lr=0.01, **options)).build(model)
    return optimizer


def make(
    model: Model,
    trainer: Trainer | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    loss: Loss | None = None,
    accumulation: Any = "mean",
    precision: Any = "fp32",
    schedule: Any = None,
    **training: Any,
) -> Updater:
    """An updater: by default gradient descent on the cross-entropy of clean inputs."""
    return Updater(
        ModelPasses(model, loss or CrossEntropy(), Precision(precision, CPU), 0),
        trainer or StandardTrainer(),
        optimizer or descent(model),
        schedule or ConstantSchedule(ScheduleConfig(), 10),
        TrainingConfig(**training),
        accumulation,
    )


def set_scale(updater: Updater, scale: float) -> None:
    """Set an fp16 updater's loss scale."""
    scaler = updater.precision.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": scale})


def cut(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    """The batch in micro-batches of these sizes."""
    parts, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        parts.append(Batch(batch.ids[rows], **{k: v[rows] for k, v in vars(batch).items() if isinstance(v, Tensor)}))
        start += size
    return parts
