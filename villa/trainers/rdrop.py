"""R-Drop (Liang et al., NeurIPS 2021): two passes with different dropout masks shall predict the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from villa.batch import Batch
from villa.registry import register_trainer
from villa.trainers.adversarial import check_finite
from villa.trainers.base import Logs, Passes, Trainer, TrainerConfig


@dataclass
class RDropConfig(TrainerConfig):
    """Options of R-Drop.

    Attributes:
        weight: alpha, the weight of the divergence; the paper tries 0.1 to 5.
    """

    weight: float = 1.0

    def check(self) -> None:
        """Raise ConfigError for values out of range."""
        check_finite(self, "weight")


@register_trainer("rdrop")
class RDropTrainer(Trainer):
    """R-Drop: the mean of the two losses, plus alpha times the mean of the two divergences.

    The divergence is that of an example, averaged over examples, so that alpha does not depend on the batch size.
    """

    Config: ClassVar[type[TrainerConfig]] = RDropConfig
    config: RDropConfig

    def step(self, batch: Batch, passes: Passes) -> Logs:
        """Run two passes with different masks, and back-propagate both at once."""
        first, second = (passes.forward(batch, index=index) for index in (0, 1))
        loss = (passes.loss(first, batch) + passes.loss(second, batch)) / 2
        divergence = passes.consistency(first, second, batch) / 2
        total = loss + self.config.weight * divergence
        passes.backward(total, last=True)
        return {"loss": total.detach(), "clean_loss": loss.detach(), "divergence": divergence.detach()}

    def cost(self) -> tuple[int, int]:
        """Return two forward and two backward passes."""
        return 2, 2

    def notes(self) -> list[str]:
        """Return a note if the two passes are the same."""
        if self.stochastic:
            return []
        return [
            "trainer 'rdrop' compares dropout masks, but the model has no dropout: this is standard training, twice"
        ]
