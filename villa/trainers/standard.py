"""Standard training."""

from __future__ import annotations

from villa.batch import Batch
from villa.registry import register_trainer
from villa.trainers.base import Logs, Passes, Trainer

#: Forward and backward passes of ``clean_step``.
CLEAN_COST = (1, 1)


@register_trainer("standard")
class StandardTrainer(Trainer):
    """Ordinary training: one clean pass."""

    def step(self, batch: Batch, passes: Passes) -> Logs:
        """Run and back-propagate one clean pass."""
        return clean_step(batch, passes)

    def cost(self) -> tuple[int, int]:
        """Return one forward and one backward pass."""
        return CLEAN_COST


def clean_step(batch: Batch, passes: Passes) -> Logs:
    """Run and back-propagate one clean pass; also used by adversarial methods for batches that they do not perturb."""
    loss = passes.loss(passes.forward(batch), batch)
    passes.backward(loss, last=True)
    return {"loss": loss.detach()}
