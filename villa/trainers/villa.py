"""VILLA (Gan et al., NeurIPS 2020): perturbed task losses plus a KL term to the clean prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.errors import ConfigError
from villa.losses.base import Reduction
from villa.models.base import ModelOutput
from villa.objectives import check_objectives
from villa.registry import register_trainer
from villa.trainers.adversarial import AdversarialConfig, Modality, MultiStepTrainer, pass_logs
from villa.trainers.base import Cost, Logs, Passes, TrainerConfig
from villa.trainers.standard import CLEAN_COST


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

    Attributes:
        output: the output of the clean pass.
        attached: whether the KL terms train it.
        objective: what else to back-propagate through its graph with the last pass, or None.
    """

    def __init__(self, output: ModelOutput, *, attached: bool) -> None:
        self.output = output
        self.attached = attached
        self.objective: Tensor | None = None
        self._copy = output.map_scores(lambda scores: scores.detach().requires_grad_(attached))

    def target(self, *, last: bool) -> ModelOutput:
        """Return the clean output for a KL term: the original in the last pass, otherwise the copy."""
        return self.output if last and self.attached else self._copy

    def complete(self, objective: Tensor, gradient_scale: float) -> Tensor:
        """Add ``self.objective`` and a term with the gradients of earlier passes to the last pass's objective."""
        pairs = zip(_scores(self.output), _scores(self._copy), strict=True)
        sums = [(real * (copy.grad / gradient_scale)).sum() for real, copy in pairs if copy.grad is not None]
        return torch.stack([objective, *sums, *([] if self.objective is None else [self.objective])]).sum()


def _scores(output: ModelOutput) -> tuple[Tensor, ...]:
    return output.logits, *output.extras.values()


@register_trainer("villa")
class VillaTrainer(MultiStepTrainer):
    """VILLA: (1/K) sum_t [L(f(x + delta_t), y) + alpha KL(f(x + delta_t), f(x))], with L(f(x), y) in the paper.

    See ``docs/villa.md`` for the differences between the released code and the paper.
    """

    Config: ClassVar[type[TrainerConfig]] = VillaConfig
    config: VillaConfig

    def step(self, batch: Batch, passes: Passes) -> Logs:
        """Run the clean pass, then K passes of every view; the clean graph is back-propagated with the last.

        If the first pass of every view is the clean pass, it runs once for all of them.
        """
        if not self.perturbs(batch):
            return self.clean_step(batch, passes)
        alpha, deltas = self.config.alpha(batch.objective), self.perturbations(passes)
        clean = self._clean(batch, passes, deltas if self.merged else None)
        loss = passes.loss(clean.output, batch)
        clean.objective = loss if self.config.clean_loss else None
        total, logs = loss.detach() * self.config.clean_loss, Logs()
        if self.merged:
            kl = passes.consistency(clean.output, clean.target(last=False), batch, self.config.kl_reduction)
            first = (loss + alpha * kl) * self._weight
            total = total + first.detach() * len(self.views)
            self._start(first, loss, clean, deltas, passes)
            logs |= pass_logs(0, deltas, loss=loss, kl=kl)
        for t in range(self.merged, self.config.steps):
            terms = []
            for v, view in enumerate(self.views):
                index = t * len(self.views) + v + 1
                last = index == self.config.steps * len(self.views)
                output = passes.forward(batch, {m: deltas[m] for m in view}, index=self.pass_index(index))
                task = passes.loss(output, batch)
                kl = passes.consistency(output, clean.target(last=last), batch, self.config.kl_reduction)
                objective = (task + alpha * kl) * self._weight
                total = total + objective.detach()
                if last:
                    objective = clean.complete(objective, passes.gradient_scale)
                passes.backward(objective, last=last)
                terms.append(torch.stack((task, kl)).detach())
            self.move(deltas, passes.gradient_scale, t)
            task, kl = torch.stack(terms).mean(0)
            logs |= pass_logs(t, deltas, loss=task, kl=kl)
        return {"loss": total, "clean_loss": loss.detach(), **logs}

    def cost(self) -> Cost:
        """Return the passes of all views, plus a clean forward pass and, if its graph is used, a backward pass.

        If the first passes are merged with the clean one, its graph is used twice: by an ascent and by a backward pass.
        """
        return self._cost(self.config.alpha(None))

    def cost_of(self, objective: str) -> Cost:
        """Return the cost with the objective's KL weight, or of one clean pass."""
        return self._cost(self.config.alpha(objective)) if self.asks_for(objective) else CLEAN_COST

    def _cost(self, alpha: float) -> Cost:
        count, attached = (self.config.steps - self.merged) * len(self.views), self._attached(alpha)
        if not self.merged:
            return count + 1, count + (attached or self.config.clean_loss)
        return (count + 1, count + 1, 1) if attached and count else (count + 1, count + 1)

    @property
    def _weight(self) -> float:
        """Weight of a perturbed pass."""
        return 1 / (self.config.steps * (len(self.views) if self.config.average_views else 1))

    def _attached(self, alpha: float) -> bool:
        return self.config.clean_logits == "attached" and alpha > 0

    def _clean(self, batch: Batch, passes: Passes, perturbations: Mapping[str, Perturbation] | None) -> CleanBranch:
        """Run the clean pass, with the perturbations that start from zero if it is merged with the first passes."""
        attached = self._attached(self.config.alpha(batch.objective))
        output = passes.forward(
            batch, perturbations, index=0, grad=attached or self.config.clean_loss or perturbations is not None
        )
        return CleanBranch(output, attached=attached)

    def _start(
        self, first: Tensor, loss: Tensor, clean: CleanBranch, deltas: Mapping[str, Perturbation], passes: Passes
    ) -> None:
        """Ascend from the clean pass, the first of every view, and train on it: now, or with the last pass.

        Args:
            first: weighted objective of the first pass of a view. The gradient of its KL term is zero.
            loss: clean loss.
            clean: the clean pass.
            deltas: perturbations of all views.
            passes: passes of the micro-batch.
        """
        views, extra = len(self.views), float(self.config.clean_loss)
        objective, alone = first * views + loss * extra, self.config.steps == 1
        if clean.attached and not alone:  # later KL terms have gradients for the clean graph
            clean.objective = objective
            passes.gradient(first, deltas, retain=True)
            self.move(deltas, 1.0, 0)
        else:
            clean.objective = None
            passes.backward(objective, last=alone)
            self.move(deltas, passes.gradient_scale * (views + extra / self._weight), 0)
