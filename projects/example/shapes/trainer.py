"""FGM (Miyato et al., ICLR 2017): the clean loss plus the loss after one gradient step on the embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from villa.adversarial.ascent import AscentSettings
from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.registry import register_trainer
from villa.trainers.base import Logs, Passes, Trainer, TrainerConfig


@dataclass
class FGMConfig(TrainerConfig):
    """Options: the length of the step."""

    step_size: float = 0.1


@register_trainer("one_step")
class FGMTrainer(Trainer):
    """Two passes; the first one's gradient is the direction of the second one's perturbation."""

    Config = FGMConfig

    def step(self, batch: Batch, passes: Passes) -> Logs:
        """Run the clean pass, step along its gradient, and run the perturbed pass."""
        delta = Perturbation(AscentSettings(step_size=self.config.step_size))  # starts at zero: a clean pass
        clean = passes.loss(passes.forward(batch, {"text": delta}, index=0), batch)
        passes.backward(clean / 2, last=False)
        delta.ascend(passes.gradient_scale)
        perturbed = passes.loss(passes.forward(batch, {"text": delta}, index=1), batch)
        passes.backward(perturbed / 2, last=True)
        return {"loss": (clean + perturbed).detach() / 2, "clean_loss": clean.detach()}

    def cost(self) -> tuple[int, int]:
        """Two forwards, two backwards."""
        return 2, 2

    def modalities(self) -> tuple[str, ...]:
        """Only the text is perturbed."""
        return ("text",)
