"""VILLA (Gan et al., NeurIPS 2020): perturbed task losses plus a KL term to the clean prediction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from villa.batch import Batch
from villa.errors import ConfigError
from villa.losses.base import Reduction
from villa.models.base import ModelOutput
from villa.objectives import check_objectives
from villa.registry import register_trainer
from villa.trainers.adversarial import AdversarialConfig, AdversarialTrainer, Modality, pass_logs
from villa.trainers.base import Logs, Passes, TrainerConfig
from villa.trainers.standard import CLEAN_COST, clean_step


@dataclass
class VillaConfig(AdversarialConfig):
    """Options of VILLA, besides those of ``AdversarialConfig``.

    Attributes:
        reference: sets the options below that differ between the ``paper`` (Algorithm 1) and the ``official``
            code; an option given explicitly wins.
        kl_weight: alpha, the weight of the KL term.
        kl_weights: in pre-training, alpha of single objectives by name, instead of ``kl_weight``.
        kl_reduction: ``batchmean``, or the ``mean`` over rows and labels.
        clean_logits: ``attached`` trains the clean branch of the KL term too; ``detached`` does not.
        clean_loss: add the loss on clean inputs, L_std, to every update.
        average_views: with ``modality=alternating``, average the two views' losses instead of adding them.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "modality": "alternating",
            "init": "uniform",
            "clean_loss": True,
            "average_views": False,
            "mask_padding": True,
            "fp32_gradient": False,
        },
        "official": {
            "modality": "text",
            "init": "zero",
            "clean_loss": False,
            "average_views": True,
            "mask_padding": False,
            "fp32_gradient": True,
        },
    }

    reference: Literal["paper", "official"] = "paper"
    modality: Modality = "alternating"
    kl_weight: float = 1.0
    kl_weights: dict[str, float] = field(default_factory=dict)
    kl_reduction: Reduction = "batchmean"
    clean_logits: Literal["attached", "detached"] = "attached"
    clean_loss: bool = True
    average_views: bool = False

    def check(self) -> None:
        """Raise ConfigError for values out of range."""
        super().check()
        check_objectives("trainer.kl_weights", self.kl_weights)
        weights = {"kl_weight": self.kl_weight} | {f"kl_weights.{name}": w for name, w in self.kl_weights.items()}
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"{name} is {weight}; it must be a finite number of at least 0")

    def alpha(self, objective: str | None) -> float:
        """Return the KL weight of an objective, or of a task (None)."""
        return self.kl_weights.get(objective or "", self.kl_weight)


class CleanBranch:
    """The clean pass: the target of the KL terms, back-propagated once for all passes.

    The weights do not change within an update, so the gradients of the KL terms with respect to the clean logits (and
    other outputs that they use) add up. They are accumulated on a detached copy and enter the clean graph with the last
    pass, as the gradient of an inner product: one clean backward pass instead of K, with the same parameter gradients.
    """

    def __init__(self, output: ModelOutput, *, attached: bool) -> None:
        self.output = output
        self.attached = attached
        self._copy = output.map_scores(lambda scores: scores.detach().requires_grad_(attached))

    def target(self, *, last: bool) -> ModelOutput:
        """Return the clean output for a KL term: the original in the last pass, otherwise the copy."""
        return self.output if last and self.attached else self._copy

    def collected(self, gradient_scale: float) -> Tensor | None:
        """Return a scalar whose gradient is what earlier passes accumulated on the clean output; None without any."""
        pairs = zip(_scores(self.output), _scores(self._copy), strict=True)
        sums = [(real * (copy.grad / gradient_scale)).sum() for real, copy in pairs if copy.grad is not None]
        return torch.stack(sums).sum() if sums else None


def _scores(output: ModelOutput) -> tuple[Tensor, ...]:
    return output.logits, *output.extras.values()


@register_trainer("villa")
class VillaTrainer(AdversarialTrainer):
    """VILLA: (1/K) sum_t [L(f(x + delta_t), y) + alpha KL(f(x + delta_t), f(x))], with L(f(x), y) in the paper.

    See ``docs/villa.md`` for the differences between the released code and the paper.
    """

    Config: ClassVar[type[TrainerConfig]] = VillaConfig
    config: VillaConfig

    def step(self, batch: Batch, passes: Passes) -> Logs:
        """Run the clean pass, then K passes of every view; the clean graph is back-propagated with the last."""
        if not self.perturbs(batch):
            return clean_step(batch, passes)
        clean = self._clean(batch, passes)
        clean_loss = passes.loss(clean.output, batch)
        deltas, logs, count = self.perturbations(passes), Logs(), self.config.steps * len(self.views)
        total, alpha = clean_loss.detach() * self.config.clean_loss, self.config.alpha(batch.objective)
        weight = 1 / (count if self.config.average_views else self.config.steps)
        for t in range(self.config.steps):
            terms = []
            for v, view in enumerate(self.views):
                index = t * len(self.views) + v + 1
                output = passes.forward(batch, {m: deltas[m] for m in view}, index=self.pass_index(index))
                task = passes.loss(output, batch)
                target = clean.target(last=index == count)
                kl = passes.consistency(output, target, batch, self.config.kl_reduction)
                objective = (task + alpha * kl) * weight
                total = total + objective.detach()
                if index == count:
                    objective = self._with_clean(objective, clean, clean_loss, passes)
                passes.backward(objective, last=index == count)
                terms.append(torch.stack((task, kl)).detach())
            self.move(deltas, passes, t)
            task, kl = torch.stack(terms).mean(0)
            logs |= pass_logs(t, deltas, loss=task, kl=kl)
        return {"loss": total, "clean_loss": clean_loss.detach(), **logs}

    def cost(self) -> tuple[int, int]:
        """Return the passes of all views, plus a clean forward pass and, if its graph is used, a backward pass."""
        return self._cost(self.config.alpha(None))

    def cost_of(self, objective: str) -> tuple[int, int]:
        """Return the cost with the objective's KL weight, or of one clean pass."""
        return self._cost(self.config.alpha(objective)) if self.asks_for(objective) else CLEAN_COST

    def _cost(self, alpha: float) -> tuple[int, int]:
        count = self.config.steps * len(self.views)
        return count + 1, count + (self._attached(alpha) or self.config.clean_loss)

    def _attached(self, alpha: float) -> bool:
        return self.config.clean_logits == "attached" and alpha > 0

    def _clean(self, batch: Batch, passes: Passes) -> CleanBranch:
        attached = self._attached(self.config.alpha(batch.objective))
        output = passes.forward(batch, index=0, grad=attached or self.config.clean_loss)
        return CleanBranch(output, attached=attached)

    def _with_clean(self, objective: Tensor, clean: CleanBranch, clean_loss: Tensor, passes: Passes) -> Tensor:
        collected = clean.collected(passes.gradient_scale)
        if collected is not None:
            objective = objective + collected
        return objective + clean_loss if self.config.clean_loss else objective
