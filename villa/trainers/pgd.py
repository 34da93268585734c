"""Methods that search a perturbation first and train on it afterwards: PGD, and FGM with its clean loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from villa.batch import Batch
from villa.registry import register_trainer
from villa.trainers.adversarial import SearchConfig, SearchTrainer, pass_logs
from villa.trainers.base import Cost, Logs, Passes, TrainerConfig


@dataclass
class PgdConfig(SearchConfig):
    """Options of PGD, besides those of ``SearchConfig``.

    Attributes:
        clean_loss: add the loss on clean inputs. With a start from zero, its gradient is that of the first ascent.
    """

    clean_loss: bool = False


@register_trainer("pgd")
class PgdTrainer(SearchTrainer):
    """PGD (Madry et al., ICLR 2018; on embeddings: the baseline of FreeLB): w L(f(x + delta_K), y).

    The K ascents leave the gradients of the parameters alone; only the last pass trains them.
    """

    Config: ClassVar[type[TrainerConfig]] = PgdConfig
    config: PgdConfig

    def step(self, batch: Batch, passes: Passes) -> Logs:
        """Ascend K times, then train on the perturbed inputs of every view."""
        if not self.perturbs(batch):
            return self.clean_step(batch, passes)
        deltas, logs, total = self.perturbations(passes), Logs(), torch.zeros(())
        if self.config.clean_loss:
            clean = passes.loss(passes.forward(batch, deltas if self._shares else None, index=0), batch)
            passes.backward(clean, last=False)
            total = logs["clean_loss"] = clean.detach()
            if self._shares:
                for delta in deltas.values():
                    delta.ascend(passes.gradient_scale)
                logs |= pass_logs(0, deltas, loss=clean)
        logs |= self.search(batch, passes, deltas, lambda output: passes.loss(output, batch), "loss", self._shares)
        losses, weight = [], self.config.weight / len(self.views)
        for last, output in self.found(batch, passes, deltas):
            losses.append(passes.loss(output, batch))
            passes.backward(losses[-1] * weight, last=last)
            losses[-1] = losses[-1].detach()
        loss = torch.stack(losses).mean()
        logs |= pass_logs(self.config.steps, deltas, loss=loss)
        return {"loss": total.to(loss) + self.config.weight * loss, **logs}

    def cost(self) -> Cost:
        """Return the ascents of all views, their last passes, and the clean pass."""
        views, clean = len(self.views), int(self.config.clean_loss)
        ascents = views * (self.config.steps - self._shares)
        return (ascents + views + clean, views + clean, *([ascents] if ascents else []))  # type: ignore[return-value]

    @cached_property
    def _shares(self) -> bool:
        """Whether the clean pass is the pass of the first ascent, too."""
        config = self.config
        wanted = config.clean_loss and config.steps > 0 and config.ascent_mode == "train"
        return wanted and self.starts_at_zero and not self.noisy


@dataclass
class FgmConfig(PgdConfig):
    """Options of FGM: those of PGD, with one ascent from the clean input, whose loss is trained too."""

    steps: int = 1
    init: str = "zero"
    clean_loss: bool = True


@register_trainer("fgm")
class FgmTrainer(PgdTrainer):
    """FGM (Miyato et al., ICLR 2017): L(f(x), y) + w L(f(x + delta), y), with delta = step size x g / |g|."""

    Config: ClassVar[type[TrainerConfig]] = FgmConfig
