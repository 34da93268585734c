"""Standard training."""

from __future__ import annotations

from villa.batch import Batch
from villa.registry import register_trainer
from villa.trainers.base import Logs, Passes, Trainer, clean_step

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
