"""Methods that search a perturbation first and train on it afterwards: PGD, and FGM with its clean loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.registry import register_trainer
from villa.trainers.adversarial import AdversarialConfig, AdversarialTrainer, check_finite, pass_logs
from villa.trainers.base import Cost, Logs, Passes, TrainerConfig
from villa.trainers.standard import clean_step


@dataclass
class PgdConfig(AdversarialConfig):
    """Options of PGD, besides those of ``AdversarialConfig``; ``steps`` counts ascents.

    Attributes:
        weight: weight of the loss on perturbed inputs.
        clean_loss: add the loss on clean inputs. With a start from zero, its gradient is that of the first ascent.
        ascent_mode: ``eval`` runs the ascents without dropout.
    """

    LEAST_STEPS: ClassVar[int] = 0

    weight: float = 1.0
    clean_loss: bool = False
    ascent_mode: Literal["train", "eval"] = "train"

    def check(self) -> None:
        """Raise ConfigError for values out of range."""
        super().check()
        check_finite(self, "weight")


@register_trainer("pgd")
class PgdTrainer(AdversarialTrainer):
    """PGD (Madry et al., ICLR 2018; on embeddings: the baseline of FreeLB): w L(f(x + delta_K), y).

    The K ascents leave the gradients of the parameters alone; only the last pass trains them.
    """

    Config: ClassVar[type[TrainerConfig]] = PgdConfig
    config: PgdConfig

    def step(self, batch: Batch, passes: Passes) -> Logs:
        """Ascend K times, then train on the perturbed inputs of every view."""
        if not self.perturbs(batch):
            return clean_step(batch, passes)
        deltas, logs, views = self.perturbations(passes), Logs(), len(self.views)
        total = torch.zeros(())
        if self.config.clean_loss:
            clean = passes.loss(passes.forward(batch, deltas if self._shares else None, index=0), batch)
            passes.backward(clean, last=False)
            total = logs["clean_loss"] = clean.detach()
            if self._shares:
                _ascend(deltas, passes.gradient_scale)
                logs |= pass_logs(0, deltas, loss=clean)
        for t in range(self._shares, self.config.steps):
            losses = []
            for v, view in enumerate(self.views):
                perturbed, index = {m: deltas[m] for m in view}, self.pass_index(t * views + v + 1)
                output = passes.forward(batch, perturbed, index=index, train=self.config.ascent_mode == "train")
                losses.append(passes.loss(output, batch))
                passes.gradient(losses[-1], perturbed)
            _ascend(deltas)
            logs |= pass_logs(t, deltas, loss=torch.stack(losses).mean())
        losses = []
        for v, view in enumerate(self.views):
            for modality in view:
                deltas[modality].frozen = True
            index = self.pass_index(self.config.steps * views + v + 1)
            losses.append(passes.loss(passes.forward(batch, {m: deltas[m] for m in view}, index=index), batch))
            passes.backward(losses[-1] * (self.config.weight / views), last=v + 1 == views)
            losses[-1] = losses[-1].detach()
        loss = torch.stack(losses).mean()
        logs |= pass_logs(self.config.steps, deltas, loss=loss)
        return {"loss": total.to(loss) + self.config.weight * loss, **logs}

    def cost(self) -> Cost:
        """Return the ascents of all views, their last passes, and the clean pass."""
        views, clean = len(self.views), int(self.config.clean_loss)
        ascents = views * (self.config.steps - self._shares)
        return (ascents + views + clean, views + clean, *([ascents] if ascents else []))  # type: ignore[return-value]

    @property
    def _shares(self) -> bool:
        """Whether the clean pass is the pass of the first ascent, too."""
        config = self.config
        wanted = config.clean_loss and config.steps > 0 and config.ascent_mode == "train"
        return wanted and all(config.ascent(modality).starts_at_zero for modality in self.modalities())


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


def _ascend(deltas: Mapping[str, Perturbation], gradient_scale: float = 1.0) -> None:
    for delta in deltas.values():
        delta.ascend(gradient_scale)
