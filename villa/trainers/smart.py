"""Smoothness of predictions around the input: SMART, and VAT, ALUM and TRADES as its presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from villa.adversarial.ascent import Norm
from villa.batch import Batch
from villa.losses.base import Direction
from villa.models.base import ModelOutput
from villa.registry import register_trainer
from villa.trainers.adversarial import AdversarialConfig, AdversarialTrainer, check_finite, pass_logs
from villa.trainers.base import Cost, Logs, Passes, TrainerConfig
from villa.trainers.standard import clean_step


@dataclass
class SmartConfig(AdversarialConfig):
    """Options of SMART, besides those of ``AdversarialConfig``; ``steps`` counts ascents.

    Attributes:
        preset: sets the options below that differ between the methods; an option given explicitly wins. See
            ``docs/methods.md``.
        weight: weight of the divergence.
        direction: ``symmetric``, ``forward`` (of the clean prediction from the perturbed one) or ``reverse``.
        ascent_direction: the same for the divergence that the ascents raise, whose clean side is detached.
        target: the side of the clean prediction is ``attached`` (trained, too) or ``detached``; ``each`` detaches the
            target of either term of a symmetric divergence, so that both predictions are trained, each by one term.
        ascent_mode: ``eval`` runs the ascents without dropout.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smart": {"norm": "linf", "direction": "symmetric", "ascent_direction": "symmetric", "target": "attached"},
        "vat": {
            "norm": "l2",
            "step": "power",
            "direction": "forward",
            "ascent_direction": "forward",
            "target": "detached",
        },
        "alum": {"norm": "linf", "scope": "token", "ascent_direction": "forward", "target": "each"},
        "mtdnn": {
            "norm": "linf",
            "scope": "token",
            "step": "raw",
            "projection": "sphere",
            "text_radius": 1.0,
            "image_radius": 1.0,
            "mask_padding": False,
            "ascent_direction": "reverse",
            "target": "each",
        },
        "trades": {
            "norm": "linf",
            "steps": 10,
            "step": "sign",
            "direction": "forward",
            "ascent_direction": "forward",
            "target": "attached",
            "ascent_mode": "eval",
        },
    }

    preset: Literal["smart", "vat", "alum", "mtdnn", "trades"] = "smart"
    steps: int = 1
    text_radius: float | None = 1e-3
    image_radius: float | None = 1e-3
    norm: Norm = "linf"
    init: str = "normal"
    init_scale: float | None = 1e-5
    weight: float = 1.0
    direction: Direction = "symmetric"
    ascent_direction: Direction = "symmetric"
    target: Literal["attached", "detached", "each"] = "attached"
    ascent_mode: Literal["train", "eval"] = "train"

    def check(self) -> None:
        """Raise ConfigError for values out of range."""
        super().check()
        check_finite(self, "weight")


@register_trainer("smart")
class SmartTrainer(AdversarialTrainer):
    """SMART's regulariser (Jiang et al., ACL 2020): L(f(x), y) + w D(f(x), f(x + delta_K)), without labels in D.

    delta ascends the divergence D from a random start: at delta = 0 its gradient is zero.
    """

    Config: ClassVar[type[TrainerConfig]] = SmartConfig
    config: SmartConfig

    def step(self, batch: Batch, passes: Passes) -> Logs:
        """Ascend the divergence K times, then train on the loss and on the divergence of every view."""
        if not self.perturbs(batch):
            return clean_step(batch, passes)
        deltas, logs, config = self.perturbations(passes), Logs(), self.config
        clean, views = passes.forward(batch, index=0), len(self.views)
        fixed = clean.map_scores(Tensor.detach)
        for t in range(config.steps):
            terms = []
            for v, view in enumerate(self.views):
                perturbed, index = {m: deltas[m] for m in view}, self.pass_index(t * views + v + 1)
                output = passes.forward(batch, perturbed, index=index, train=config.ascent_mode == "train")
                terms.append(passes.consistency(output, fixed, batch, direction=config.ascent_direction))
                passes.gradient(terms[-1], perturbed)
            for delta in deltas.values():
                delta.ascend()
            logs |= pass_logs(t, deltas, divergence=torch.stack(terms).mean())
        terms = []
        for v, view in enumerate(self.views):
            for modality in view:
                deltas[modality].frozen = True
            index = self.pass_index(config.steps * views + v + 1)
            output = passes.forward(batch, {m: deltas[m] for m in view}, index=index)
            terms.append(self._divergence(output, clean, batch, passes))
        loss, divergence = passes.loss(clean, batch), torch.stack(terms).mean()
        total = loss + config.weight * divergence
        passes.backward(total, last=True)
        logs |= pass_logs(config.steps, deltas, divergence=divergence)
        return {"loss": total.detach(), "clean_loss": loss.detach(), **logs}

    def cost(self) -> Cost:
        """Return the clean pass, the ascents of all views, and their last passes; all but ascents are trained."""
        views, ascents = len(self.views), self.config.steps * len(self.views)
        return 1 + views + ascents, 1 + views, ascents

    def _divergence(self, output: ModelOutput, clean: ModelOutput, batch: Batch, passes: Passes) -> Tensor:
        """Return the divergence to train on."""
        if self.config.target == "each":
            fixed = clean.map_scores(Tensor.detach), output.map_scores(Tensor.detach)
            perturbed = passes.consistency(output, fixed[0], batch, direction="forward")
            return perturbed + passes.consistency(fixed[1], clean, batch, direction="reverse")
        target = clean if self.config.target == "attached" else clean.map_scores(Tensor.detach)
        return passes.consistency(output, target, batch, direction=self.config.direction)
