"""Smoothness of predictions around the input: SMART, and VAT, ALUM and TRADES as its presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from villa.adversarial.ascent import Norm
from villa.batch import Batch
from villa.errors import ConfigError
from villa.losses.base import Direction
from villa.models.base import ModelOutput
from villa.registry import register_trainer
from villa.trainers.adversarial import SearchConfig, SearchTrainer, check_finite, pass_logs
from villa.trainers.base import Cost, Logs, Passes, TrainerConfig


@dataclass
class SmartConfig(SearchConfig):
    """Options of SMART, besides those of ``SearchConfig``.

    Attributes:
        preset: sets the options below that differ between the methods; an option given explicitly wins. See
            ``docs/methods.md``.
        direction: ``symmetric``, ``forward`` (of the clean prediction from the perturbed one) or ``reverse``.
        ascent_direction: the same for the divergence that the ascents raise, whose clean side is detached.
        target: the side of the clean prediction is ``attached`` (trained, too) or ``detached``; ``each`` detaches the
            target of either term of a symmetric divergence, so that both predictions are trained, each by one term.
        proximal_weight: mu, the weight of the Bregman proximal term: the symmetric divergence from the predictions of a
            running average of the weights, on clean inputs. 0 keeps no average; the paper takes 1.
        proximal_decay: beta, the decay of that average in the first tenth of the training.
        proximal_late_decay: the decay afterwards.
    """

    #: Share of the training after which the average of the proximal term changes more slowly.
    LATE: ClassVar[float] = 0.1

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
    direction: Direction = "symmetric"
    ascent_direction: Direction = "symmetric"
    target: Literal["attached", "detached", "each"] = "attached"
    proximal_weight: float = 0.0
    proximal_decay: float = 0.99
    proximal_late_decay: float = 0.999

    def check(self) -> None:
        """Raise ConfigError for values out of range."""
        super().check()
        check_finite(self, "proximal_weight")
        for name in ("proximal_decay", "proximal_late_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")


@register_trainer("smart")
class SmartTrainer(SearchTrainer):
    """SMART's regulariser (Jiang et al., ACL 2020): L(f(x), y) + w D(f(x), f(x + delta_K)), without labels in D.

    delta ascends the divergence D from a random start: at delta = 0 its gradient is zero. The proximal term adds
    mu D(f(x), f~(x)), where f~ has a running average of the weights.
    """

    Config: ClassVar[type[TrainerConfig]] = SmartConfig
    config: SmartConfig

    def step(self, batch: Batch, passes: Passes) -> Logs:
        """Ascend the divergence K times, then train on the loss and on the divergence of every view."""
        if not self.perturbs(batch):
            return self.clean_step(batch, passes)
        anchor = passes.reference(batch) if self.config.proximal_weight else None
        deltas, direction = self.perturbations(passes), self.config.ascent_direction
        clean = None if self._steady else passes.forward(batch, index=0)
        fixed = passes.forward(batch, grad=False, train=False) if clean is None else clean.map_scores(Tensor.detach)
        logs = self.search(
            batch,
            passes,
            deltas,
            lambda output: passes.consistency(output, fixed, batch, direction=direction),
            "divergence",
        )
        clean = clean or passes.forward(batch, index=0)
        terms = [self._divergence(output, clean, batch, passes) for _, output in self.found(batch, passes, deltas)]
        loss, divergence = passes.loss(clean, batch), torch.stack(terms).mean()
        total = loss + self.config.weight * divergence
        if anchor is not None:
            proximal = passes.consistency(clean, anchor, batch)
            total, logs["proximal"] = total + self.config.proximal_weight * proximal, proximal.detach()
        passes.backward(total, last=True)
        logs |= pass_logs(self.config.steps, deltas, divergence=divergence)
        return {"loss": total.detach(), "clean_loss": loss.detach(), **logs}

    def cost(self) -> Cost:
        """Return the clean pass, the ascents of all views, and their last passes; all but ascents are trained.

        The proximal term takes a forward pass more, and so do ascents without dropout, for their own clean prediction.
        """
        views, ascents = len(self.views), self.config.steps * len(self.views)
        return 1 + views + ascents + bool(self.config.proximal_weight) + self._steady, 1 + views, ascents

    def notes(self) -> list[str]:
        """Return a note if no ascent has a direction."""
        if self.stochastic or self.config.init != "zero" or not self.config.steps:
            return []
        return [
            "trainer 'smart' starts at a zero perturbation, where the divergence has no gradient, and the model has no "
            "dropout: nothing is perturbed; set trainer.init=normal"
        ]

    def reference_decay(self, progress: float) -> float | None:
        """Return the decay for the average of the proximal term."""
        config = self.config
        if not config.proximal_weight:
            return None
        return config.proximal_decay if progress <= config.LATE else config.proximal_late_decay

    @property
    def _steady(self) -> bool:
        """Whether ascents, being without dropout, lead away from a clean prediction without dropout."""
        return self.config.ascent_mode == "eval" and self.config.steps > 0

    def _divergence(self, output: ModelOutput, clean: ModelOutput, batch: Batch, passes: Passes) -> Tensor:
        """Return the divergence to train on."""
        if self.config.target == "each":
            fixed = clean.map_scores(Tensor.detach), output.map_scores(Tensor.detach)
            perturbed = passes.consistency(output, fixed[0], batch, direction="forward")
            return perturbed + passes.consistency(fixed[1], clean, batch, direction="reverse")
        target = clean if self.config.target == "attached" else clean.map_scores(Tensor.detach)
        return passes.consistency(output, target, batch, direction=self.config.direction)
