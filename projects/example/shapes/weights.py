"""Methods that act on weights: SAM (Foret et al., ICLR 2021), and a running average of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from villa.registry import register_trainer
from villa.trainers.base import Cost, Frame, Logs, TrainerConfig
from villa.trainers.standard import StandardTrainer


@dataclass
class SamConfig(TrainerConfig):
    """Options: how far the weights go up, in the norm of all of them."""

    rho: float = 0.05


@register_trainer("sam")
class SamTrainer(StandardTrainer):
    """The step is taken with the gradients at the weights that have gone up the slope by ``rho``."""

    Config = SamConfig

    def update(self, frame: Frame) -> Logs:
        """Run the micro-batches, run them again higher up, and take the step."""
        logs = frame.accumulate()
        scale = self.config.rho / (frame.norm(frame.gradients) + 1e-12)
        with frame.moved({name: scale * gradient for name, gradient in frame.gradients.items()}):
            sharp = frame.accumulate()
        frame.step()
        return logs | {"sharp_loss": sharp["loss"]}

    def cost(self) -> Cost:
        """Two forwards, two backwards."""
        return 2, 2


@dataclass
class AverageConfig(TrainerConfig):
    """Options: how much of the average stays in an update; less in the first ones."""

    decay: float = 0.999


@register_trainer("averaging")
class AveragingTrainer(StandardTrainer):
    """Ordinary training, with a running average of the weights in its checkpoints."""

    Config = AverageConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.seen = 0

    def update(self, frame: Frame) -> Logs:
        """Run the update, and take the new weights into the average."""
        logs = super().update(frame)
        weights = frame.weights
        average = self.weight_state.get("average") or {name: weight.clone() for name, weight in weights.items()}
        decay = min(self.config.decay, (1 + self.seen) / (10 + self.seen))
        for name, weight in weights.items():
            average[name].lerp_(weight, 1 - decay)
        self.weight_state["average"] = average
        self.seen += 1
        return logs

    def state_dict(self) -> dict[str, Any]:
        """How many updates the average has seen."""
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict()``."""
        self.seen = state["seen"]
