"""FreeLB (Zhu et al., ICLR 2020): K perturbed passes whose parameter gradients are averaged."""

from __future__ import annotations

from typing import ClassVar

import torch

from villa.batch import Batch
from villa.registry import register_trainer
from villa.trainers.adversarial import AdversarialConfig, MultiStepTrainer, pass_logs
from villa.trainers.base import Logs, Passes, TrainerConfig


class FreeLBConfig(AdversarialConfig):
    """Options of FreeLB: those of ``AdversarialConfig``. ``steps`` counts passes, not ascents."""


@register_trainer("freelb")
class FreeLBTrainer(MultiStepTrainer):
    """FreeLB: every ascent step's backward also trains the parameters.

    The loss of an update is (1/K) sum_t L(f(x + delta_t), y); the clean input is seen only if delta_0 = 0.
    """

    Config: ClassVar[type[TrainerConfig]] = FreeLBConfig
    config: FreeLBConfig

    def step(self, batch: Batch, passes: Passes) -> Logs:
        """Run the K passes of every view, with ascent steps between them."""
        if not self.perturbs(batch):
            return self.clean_step(batch, passes)
        steps, weight = self.config.steps, 1 / (self.config.steps * len(self.views))
        deltas, logs, index, means = self.perturbations(passes), Logs(), 0, []
        for t in range(steps):
            losses = []
            for view in self.views:
                index += 1
                output = passes.forward(batch, {m: deltas[m] for m in view}, index=self.pass_index(index))
                loss = passes.loss(output, batch)
                passes.backward(loss * weight, last=index == steps * len(self.views))
                losses.append(loss.detach())
            self.move(deltas, passes.gradient_scale, t)
            means.append(torch.stack(losses).mean() if len(losses) > 1 else losses[0])
            logs |= pass_logs(t, deltas, loss=means[-1])
        return {"loss": torch.stack(means).mean(), **logs}

    def cost(self) -> tuple[int, int]:
        """Return one forward and one backward pass for each pass of each view."""
        count = self.config.steps * len(self.views)
        return count, count
