"""Evaluation and prediction: forward passes without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from villa.batch import Batch
from villa.datasets.stream import StandIn
from villa.distributed.strategy import Strategy
from villa.engine.passes import Precision, evaluating
from villa.evaluation.metrics import Metric
from villa.facts import Written
from villa.losses.base import Loss
from villa.models.base import Model, ModelOutput


class Ran(NamedTuple):
    """A batch with the model's output.

    Attributes:
        batch: on the model's device.
        output: logits in fp32 or wider.
        own: False for a stand-in: another rank evaluates this batch.
    """

    batch: Batch
    output: ModelOutput
    own: bool


class Evaluator:
    """Scores batches with a model in evaluation mode.

    Args:
        model: the model; its training mode is restored afterwards.
        loss: the task loss, reported as ``loss``.
        metrics: computed over all batches.
        precision: autocast.
        strategy: how processes share the model and the batches; a single process by default.
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        metrics: Mapping[str, Metric],
        precision: Precision,
        strategy: Strategy | None = None,
    ) -> None:
        self.model, self.loss, self.metrics, self.precision = model, loss, metrics, precision
        self.strategy = strategy or Strategy()

    def predict(self, batches: Iterable[Batch | StandIn]) -> Iterator[Ran]:
        """Yield every batch with the model's output."""
        with evaluating(self.model):
            for item in batches:
                own = isinstance(item, Batch)
                moved = (item if isinstance(item, Batch) else item.batch).to(self.precision.device)
                with self.strategy.without_gradients():
                    output = self.precision.run(self.model, moved)
                yield Ran(moved, output, own)

    def predictions(self, batch: Batch, output: ModelOutput) -> Tensor | Written:
        """Return what the data set decodes for a batch that ``predict`` has yielded: logits, or generated text."""
        with self.strategy.without_gradients(), self.precision.autocast():
            return self.model.predictions(batch, output)

    def evaluate(
        self, batches: Iterable[Batch | StandIn], each: Callable[[Ran], None] | None = None
    ) -> dict[str, float]:
        """Return every metric over the batches of all processes, and the mean loss where there are targets.

        With batches of several objectives, ``<objective>_loss`` is the mean of each, and ``loss`` the overall mean.

        Args:
            batches: this process's share of the split's batches.
            each: called with every batch and its output, after the metrics, for example to write predictions in the
                same pass.

        Raises:
            DataError: the examples have no targets, or targets that a metric cannot read.
        """
        for metric in self.metrics.values():
            metric.reset()
        means: dict[str | None, _Mean] = {}
        seen = False
        for ran in self.predict(batches):
            batch, output, own = ran
            if own and (batch.targets is not None or not self.metrics):
                means.setdefault(batch.objective, _Mean()).add(self.loss(output, batch), self.loss.count(batch))
            for metric in self.metrics.values() if own or not seen else ():  # without a batch, a metric lacks its size
                metric.update(output, batch)
            seen = seen or own
            if each is not None:
                each(ran)
        values = _losses(self._merged_means(means))
        for metric in self.metrics.values():
            self._merge(metric, seen)
            values |= metric.compute()
        return values

    def _merged_means(self, means: Mapping[str | None, _Mean]) -> dict[str | None, _Mean]:
        """Return the means over the batches of all processes."""
        merged: dict[str | None, _Mean] = {}
        for parts in self.strategy.processes.gather([[key, mean.total(), mean.count] for key, mean in means.items()]):
            for objective, total, count in parts:
                merged.setdefault(objective, _Mean()).add_total(total, count)
        return merged

    def _merge(self, metric: Metric, seen: bool) -> None:
        """Combine a metric over all processes; one that has not ``seen`` a batch of its own adds nothing."""
        processes = self.strategy.processes
        if processes.world_size == 1:
            return
        states = processes.gather_tensors(metric.state() if seen else torch.zeros(0, dtype=torch.float64))
        known = [state for state, has in zip(states, processes.gather(seen), strict=True) if has]
        if known:
            metric.load_states(known)


def _losses(means: Mapping[str | None, _Mean]) -> dict[str, float]:
    """Return the overall ``loss`` and, if there are several objectives, the loss of each."""
    losses = {objective: mean.compute() for objective, mean in means.items() if mean.count}
    values = {"loss": sum(losses.values()) / len(losses)} if losses else {}
    if len(losses) > 1:
        values |= {f"{objective}_loss": loss for objective, loss in losses.items()}
    return values


class _Mean:
    """A mean over elements, accumulated on the device."""

    def __init__(self) -> None:
        self._total: Tensor | float = 0.0
        self.count = 0

    def add(self, mean: Tensor, elements: int) -> None:
        self.add_total(mean.double() * elements, elements)

    def add_total(self, total: Tensor | float, elements: int) -> None:
        self._total = self._total + total
        self.count += elements

    def total(self) -> float:
        return float(self._total)

    def compute(self) -> float:
        return self.total() / self.count
