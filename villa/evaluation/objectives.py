"""Metrics of pre-training: each scores the batches of its objectives, and passes over all others."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from villa.batch import Batch
from villa.errors import DataError
from villa.evaluation.metrics import MeanScore
from villa.models.base import ModelOutput
from villa.registry import register_metric


class ObjectiveAccuracy(MeanScore):
    """Share of the rows of ``logits [N, classes]`` whose highest one is what was asked for.

    Attributes:
        objectives: those that it scores; data without them have no such value.
    """

    objectives: ClassVar[tuple[str, ...]]

    def update(self, output: ModelOutput, batch: Batch) -> None:
        """Add the batch's rows, if it is for one of the objectives."""
        if batch.objective not in self.objectives:
            return
        if batch.targets is None:
            raise DataError(f"metric '{self.name}': the examples have no targets (first: '{batch.ids[0]}')")
        self.add(output.logits.detach().argmax(-1) == self.right(batch.targets))

    def right(self, targets: Tensor) -> Tensor:
        """Return the right class ``[N]`` of every row."""
        return targets

    def compute(self) -> dict[str, float]:
        """Return the share by name; nothing where no batch was for the objectives."""
        return super().compute() if self._count else {}


@register_metric("mlm_accuracy")
class MlmAccuracy(ObjectiveAccuracy):
    """Share of the masked words that the model finds."""

    name = "mlm_accuracy"
    objectives = ("mlm",)


@register_metric("itm_accuracy")
class ItmAccuracy(ObjectiveAccuracy):
    """Share of the pairs of which the model knows whether text and image match."""

    name = "itm_accuracy"
    objectives = ("itm", "itm_wra")


@register_metric("mrc_accuracy")
class MrcAccuracy(ObjectiveAccuracy):
    """Share of the masked regions whose likeliest class is the detector's, column 0 (background) left out there."""

    name = "mrc_accuracy"
    objectives = ("mrc", "mrc_kl")

    def right(self, targets: Tensor) -> Tensor:
        """Return the detector's likeliest class, as the loss ``mrc`` takes it."""
        return targets[:, 1:].argmax(-1) + 1 if targets.is_floating_point() else targets
