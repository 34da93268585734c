"""The regulariser of SMART (Jiang et al., ACL 2020): predictions shall not move in the worst direction nearby."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from villa.adversarial.ascent import AscentSettings
from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.registry import register_trainer
from villa.trainers.base import Cost, Logs, Passes, Trainer, TrainerConfig


@dataclass
class SmartConfig(TrainerConfig):
    """Options: number and length of ascents, their first noise, radius and dropout; weight of the divergence."""

    steps: int = 1
    step_size: float = 1e-3
    noise: float = 1e-5
    radius: float = 1e-3
    weight: float = 1.0
    dropout: bool = True


@register_trainer("smooth")
class SmartTrainer(Trainer):
    """The clean loss, and the divergence between the clean predictions and those after K ascents of it."""

    Config = SmartConfig

    def step(self, batch: Batch, passes: Passes) -> Logs:
        """Ascend the divergence K times from noise, and back-propagate the loss with the divergence there."""
        config = self.config
        clean = passes.forward(batch)
        settings = AscentSettings(config.step_size, config.radius, "linf", "normal", config.noise)
        delta = Perturbation(settings, passes.seed("smart"))
        target = clean.map_scores(Tensor.detach)
        for _ in range(config.steps):
            output = passes.forward(batch, {"text": delta}, train=config.dropout)
            passes.gradient(passes.consistency(output, target, batch, "batchmean"), {"text": delta})
            delta.ascend()
        delta.frozen = True
        output = passes.forward(batch, {"text": delta})
        divergence = passes.consistency(output, clean, batch, "batchmean")
        loss = passes.loss(clean, batch)
        passes.backward(loss + config.weight * divergence, last=True)
        return {"loss": loss.detach(), "divergence": divergence.detach()}

    def cost(self) -> Cost:
        """The clean pass and the last one go back as one; every ascent is a forward and its own way back."""
        return 2 + self.config.steps, 2, self.config.steps

    def modalities(self) -> tuple[str, ...]:
        """Only the text is perturbed."""
        return ("text",)
