"""Methods as a project outside of villa writes them, against ``villa.trainers.base`` alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from villa.adversarial.ascent import AscentSettings
from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.trainers.base import Frame, Logs, Passes, Trainer
from villa.trainers.standard import StandardTrainer
from villa.trainers.villa import VillaTrainer


class Awp(Trainer):
    """AWP (Wu et al., NeurIPS 2020) around a method: each weight goes up by a share of its own norm."""

    gamma = 0.01

    def update(self, frame: Frame) -> Logs:
        """Run the micro-batches for the direction, again with moved weights for the gradients, and step."""
        frame.accumulate()
        gradients = frame.gradients
        sizes, slopes = frame.norms(frame.weights), frame.norms(gradients)
        scales = {name: self.gamma * sizes[name] / (slopes[name] + 1e-20) for name in gradients}
        with frame.moved({name: scales[name] * gradient for name, gradient in gradients.items()}):
            logs = frame.accumulate()
        frame.step()
        return logs


class AwpStandard(Awp, StandardTrainer):
    """AWP around ordinary training."""


class AwpVilla(Awp, VillaTrainer):
    """AWP around VILLA."""


class Elsewhere(StandardTrainer):
    """Ordinary training on the gradients of weights that are a tenth larger."""

    def update(self, frame: Frame) -> Logs:
        """Move the weights before any pass."""
        with frame.moved({name: 0.1 * weight for name, weight in frame.weights.items()}):
            logs = frame.accumulate()
        frame.step()
        return logs


class Overflowing(StandardTrainer):
    """Ordinary training after an ascent whose gradient is infinite in fp16, in the micro-batch with example 9."""

    def step(self, batch: Batch, passes: Passes) -> Logs:
        """Ascend, and run a clean pass."""
        delta = Perturbation(AscentSettings(step_size=0.1))
        loss = passes.loss(passes.forward(batch, {"text": delta}), batch)
        passes.gradient(loss * (1e37 if "9" in batch.ids else 1.0), {"text": delta})
        return super().step(batch, passes)


class Astray(StandardTrainer):
    """Training on perturbed texts whose ascent has an infinite gradient in the micro-batch with example 9."""

    def step(self, batch: Batch, passes: Passes) -> Logs:
        """Ascend, of a loss that is finite, and train where that has led to."""
        delta = Perturbation(AscentSettings(step_size=0.1))
        loss = passes.loss(passes.forward(batch, {"text": delta}, index=1), batch)
        passes.gradient((loss - loss.detach()).sqrt() if "9" in batch.ids else loss, {"text": delta})
        delta.ascend()
        delta.frozen = True
        loss = passes.loss(passes.forward(batch, {"text": delta}), batch)
        passes.backward(loss, last=True)
        return {"loss": loss.detach(), "perturbed_loss": loss.detach()}

    def modalities(self) -> tuple[str, ...]:
        """Only the text is perturbed."""
        return ("text",)


class AscendingVilla(VillaTrainer):
    """VILLA, after all its perturbations were made by ``Passes.gradient`` alone; both are kept.

    Attributes:
        found: of each micro-batch, by ascent and modality, what ``gradient`` has led to, and VILLA's own passes.
    """

    def __init__(self, config: object = None) -> None:
        super().__init__(config)
        self.found: list[list[tuple[str, Tensor, Tensor]]] = []
        self.own: list[dict[str, Tensor]] = []

    def step(self, batch: Batch, passes: Passes) -> Logs:
        """Ascend K - 1 times without a trace, then run VILLA."""
        ascended = self.ascend(batch, passes)
        self.own.clear()
        logs = super().step(batch, passes)
        pairs = zip(ascended, self.own, strict=True)
        self.found.append(
            [(modality, delta, theirs[modality]) for ours, theirs in pairs for modality, delta in ours.items()]
        )
        return logs

    def ascend(self, batch: Batch, passes: Passes) -> list[dict[str, Tensor]]:
        """The perturbations after each ascent, every view's objective being VILLA's."""
        config, deltas, found = self.config, self.perturbations(passes), []
        clean = passes.forward(batch, index=0, grad=False)
        weight = 1 / (config.steps * (len(self.views) if config.average_views else 1))
        for t in range(config.steps - 1):
            for v, view in enumerate(self.views):
                perturbed = {modality: deltas[modality] for modality in view}
                index = self.pass_index(t * len(self.views) + v + 1)
                output = passes.forward(batch, perturbed, index=index)
                kl = passes.consistency(output, clean, batch, config.kl_reduction)
                passes.gradient((passes.loss(output, batch) + config.kl_weight * kl) * weight, perturbed)
            for delta in deltas.values():
                delta.ascend()
            found.append({modality: delta.delta.clone() for modality, delta in deltas.items()})
        return found

    def move(self, perturbations: Mapping[str, Perturbation], gradient_scale: float, step: int) -> None:
        """Keep what VILLA's own ascent has led to."""
        super().move(perturbations, gradient_scale, step)
        if step + 1 < self.config.steps:
            self.own.append({m: p.delta.detach().clone() for m, p in perturbations.items()})
