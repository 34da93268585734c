"""Evaluation and prediction: forward passes without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from villa.batch import Batch
from villa.engine.precision import Precision
from villa.evaluation.metrics import Metric
from villa.losses.base import Loss
from villa.models.base import Model, ModelOutput, Written


class Evaluator:
    """Scores batches with a model in evaluation mode.

    Args:
        model: the model; its mode is put back afterwards.
        loss: the task loss, reported as ``loss``.
        metrics: computed over all batches.
        precision: autocast.
    """

    def __init__(self, model: Model, loss: Loss, metrics: Mapping[str, Metric], precision: Precision) -> None:
        self.model, self.loss, self.metrics, self.precision = model, loss, metrics, precision

    def predict(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, ModelOutput]]:
        """Yield every batch with the model's output, logits in fp32 or wider."""
        training = self.model.training
        self.model.eval()
        try:
            for batch in batches:
                moved = batch.to(self.precision.device)
                with torch.inference_mode():
                    output = self.precision.run(self.model, moved)
                yield moved, output
        finally:
            self.model.train(training)

    def predictions(self, batch: Batch, output: ModelOutput) -> Tensor | Written:
        """What the data set decodes for a batch that ``predict`` has yielded: its logits, or a generated text."""
        with torch.inference_mode(), self.precision.autocast():
            return self.model.predictions(batch, output)

    def evaluate(
        self, batches: Iterable[Batch], each: Callable[[Batch, ModelOutput], None] | None = None
    ) -> dict[str, float]:
        """Return every metric over the batches, and the mean loss where there are targets.

        Batches may be for several objectives: ``<objective>_loss`` is then the mean of each, and ``loss`` theirs.

        Args:
            batches: the split's batches.
            each: also called with every batch and its output, to write predictions in the same pass.

        Raises:
            DataError: the examples have no targets, or targets that a metric cannot read.
        """
        for metric in self.metrics.values():
            metric.reset()
        means: dict[str | None, _Mean] = {}
        for batch, output in self.predict(batches):
            if batch.targets is not None or not self.metrics:
                means.setdefault(batch.objective, _Mean()).add(self.loss(output, batch), self.loss.count(batch))
            if each is not None:
                each(batch, output)
            for metric in self.metrics.values():
                metric.update(output, batch)
        losses = {objective: mean.compute() for objective, mean in means.items() if mean.count}
        values = {"loss": sum(losses.values()) / len(losses)} if losses else {}
        if len(losses) > 1:
            values |= {f"{objective}_loss": loss for objective, loss in losses.items()}
        for metric in self.metrics.values():
            values |= metric.compute()
        return values


class _Mean:
    """A mean over elements, summed up on the device."""

    def __init__(self) -> None:
        self._total: Tensor | float = 0.0
        self.count = 0

    def add(self, mean: Tensor, elements: int) -> None:
        self._total = self._total + mean.double() * elements
        self.count += elements

    def compute(self) -> float:
        return float(self._total) / self.count
