"""A batch of examples under attack: passes of the model, and the worst case of every example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from villa.adversarial.ascent import AscentSettings, initialise, project
from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.errors import ConfigError, DataError
from villa.evaluation.metrics import Metric
from villa.losses.base import Loss
from villa.losses.classification import widened
from villa.models.base import ModelOutput
from villa.rng import derive_seed, seed_pass
from villa.trainers.base import Passes

#: Values of a channel of an image file.
_BYTES = 255


def is_pixels(key: str) -> bool:
    """Return whether a perturbation point is that of whole images."""
    return key.endswith(".pixels")


class DrawnPerturbation(Perturbation):
    """A perturbation whose random start depends on the example, and not on the batch that it is in.

    Args:
        settings: initialisation and ascent.
        seeds: a seed for each example; its rows follow one another.
        initial: where to start from instead.
    """

    def __init__(self, settings: AscentSettings, seeds: Sequence[int], *, initial: Tensor | None = None) -> None:
        super().__init__(settings, initial=initial)
        self._seeds = seeds

    def start(self, values: Tensor) -> Tensor:
        """Draw the first perturbation within the radius, row by row on the real tokens."""
        if self.settings.starts_at_zero:
            return super().start(values)
        each = rows_of_each(len(values), len(self._seeds))
        delta = torch.zeros_like(values, dtype=torch.promote_types(values.dtype, torch.float32))
        for row, own in enumerate(values):
            real = slice(None) if self.mask is None else self.mask[row]
            unit = self.unit if self.unit is None or self.unit.dim() == 0 else self.unit[row : row + 1]
            if unit is not None and unit.dim() > 1 and unit.shape[1] > 1:
                unit = unit[:, real]
            seed = derive_seed(self._seeds[row // each], row % each)
            drawn = initialise(own[real].unsqueeze(0), self.settings, None, seed, unit)
            delta[row, real] = project(drawn, self.settings, unit)[0]
        return delta if self.bounds is None else delta.clamp(*self.bounds)


def rows_of_each(rows: int, examples: int) -> int:
    """Return the number of rows of an example.

    Raises:
        ConfigError: the rows cannot be attributed to examples.
    """
    if rows % examples:
        raise ConfigError(
            f"{rows} rows are perturbed in a batch of {examples} examples, so that it is unknown which belong to which;"
            " set evaluation.examples=1"
        )
    return rows // examples


def singles(output: ModelOutput, batch: Batch) -> Iterator[tuple[ModelOutput, Batch]]:
    """Yield the output and the batch of each example by itself."""
    count = len(batch)
    if batch.answer_mask is not None:
        sizes: list[int] = batch.answer_mask.sum(1).tolist()
    else:
        sizes = [rows_of_each(len(output.logits), count)] * count
    logits = torch.split(output.logits, sizes)
    targets = batch.targets
    parts: tuple[Tensor | None, ...] = (None,) * count
    if targets is not None:
        parts = torch.split(targets, 1 if len(targets) == count else sizes)
    rows = {field.name: getattr(batch, field.name) for field in fields(batch)}
    rows = {name: value for name, value in rows.items() if isinstance(value, Tensor | list) and len(value) == count}
    for number in range(count):
        alone: dict[str, Any] = {name: value[number : number + 1] for name, value in rows.items()}
        yield ModelOutput(logits[number]), Batch(**{**alone, "targets": parts[number]})


class Measure:
    """The loss that an attack raises and the score that it lowers, of every example.

    Args:
        loss: the task's loss.
        metric: gives the score of an example, in [0, 1].
        objective: what attacks raise: the ``task``'s loss, or the ``margin``.
    """

    def __init__(self, loss: Loss, metric: Metric, objective: str = "task") -> None:
        self.loss, self.metric, self.objective = loss, metric, objective

    def __call__(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return losses and scores ``[B]``."""
        losses, scores = [], []
        for alone, example in singles(output, batch):
            seed_pass(0, 0, 0, 0)  # a loss may draw negatives
            losses.append(self.loss(alone, example) if self.objective == "task" else margin(alone, example))
            self.metric.reset()
            self.metric.update(alone, example)
            scores.append(next(iter(self.metric.compute().values())))
        return torch.stack(losses), torch.tensor(scores, dtype=torch.float64)


def margin(output: ModelOutput, batch: Batch) -> Tensor:
    """Return the highest wrong logit minus the highest right one, averaged over rows (Carlini and Wagner, 2017).

    Unlike cross-entropy, it does not saturate. Right are the labels of the highest target.

    Raises:
        DataError: the targets do not say which labels are right.
    """
    logits, targets = widened(output.logits), batch.targets
    if targets is None or logits.dim() != 2 or logits.shape[1] < 2:
        raise DataError("the margin needs logits of two labels or more, and targets; use the loss 'task'")
    if targets.is_floating_point():
        right = (targets == targets.amax(-1, keepdim=True)) & (targets > 0)
    else:
        right = torch.zeros_like(logits, dtype=torch.bool).scatter(1, targets.reshape(-1, 1), True)
    wrong = logits.masked_fill(right, -torch.inf).amax(1)
    best = logits.masked_fill(~right, -torch.inf).amax(1)
    difference = wrong - best
    return torch.where(difference.isfinite(), difference, 0.0).mean()


class HeldOut:
    """Examples that are not attacked, from which an attack may learn; the same on every process.

    Args:
        batches: returns them.

    Attributes:
        found: what attacks have learned.
    """

    def __init__(self, batches: Callable[[], Iterable[Batch]]) -> None:
        self._batches = batches
        self.found: dict[Any, Any] = {}

    def victims(self, like: Victim) -> list[Victim]:
        """Return victims of the batches that are attacked as ``like`` is."""
        return [
            Victim(like.passes, batch, like.measure, [0] * len(batch), bool, like.source) for batch in self._batches()
        ]


class Victim:
    """A batch under attack.

    Args:
        passes: the model that is attacked.
        batch: the examples.
        measure: loss and score.
        seeds: a seed for each example.
        agree: returns whether any process has work left, given whether this one has; a collective call.
        source: the model whose gradients are followed instead, for attacks that are transferred.
        held_out: other examples, for attacks that learn from them.

    Attributes:
        scores: the worst score of every example so far, ``[B]``.
        losses: its loss there.
        sizes: by modality, the size of its perturbation there relative to the embedding, ``[B]``.
        kept: by modality, its perturbation there, ``[rows, tokens, width]``.
        flat: whether the first gradient of an example was zero or not finite, ``[B]``; None before it.
        slope_errors: relative errors of the gradient, ``[B]``; None if they were not measured.
        forwards: forward passes so far.
        backwards: backward passes so far.
    """

    def __init__(
        self,
        passes: Passes,
        batch: Batch,
        measure: Measure,
        seeds: Sequence[int],
        agree: Callable[[bool], bool] = bool,
        source: Passes | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        self.passes, self.batch, self.measure, self.agree, self.source = passes, batch, measure, agree, source
        self.held_out = held_out
        self._seeds = seeds
        self.forwards = self.backwards = 0
        self.flat: Tensor | None = None
        self.slope_errors: Tensor | None = None
        self.scores = torch.full((len(batch),), torch.inf, dtype=torch.float64)
        self.losses = torch.full_like(self.scores, -torch.inf)
        self.sizes: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        self._colours: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._settings: dict[str, AscentSettings] = {}

    def inherit(self, other: Victim) -> None:
        """Begin with the worst case that an attack in a smaller ball has found."""
        self.scores, self.losses = other.scores, other.losses
        self.sizes, self.kept = dict(other.sizes), dict(other.kept)
        self._colours, self._settings = dict(other._colours), dict(other._settings)

    def seeds(self, *parts: int | str) -> list[int]:
        """Return seeds of each example's draws called ``parts``."""
        return [derive_seed(seed, *parts) for seed in self._seeds]

    def done(self) -> bool:
        """Whether no example, on any process, can get a lower score; a collective call."""
        return not self.agree(bool((self.scores > 0).any()))

    def run(self, perturbations: Mapping[str, Perturbation], *, gradient: bool = False, wide: bool = False) -> Tensor:
        """Run a pass; keep what is worse for an example than all before.

        Args:
            perturbations: what to add, by modality.
            gradient: set the gradients of the perturbations.
            wide: compute losses from the logits in fp64, so that small differences are not rounded away.

        Returns:
            The losses ``[B]`` of the model whose gradients are followed.
        """
        guide = self.source or self.passes
        for perturbation in perturbations.values():
            perturbation.frozen = not gradient
        output = guide.forward(self.batch, perturbations, grad=gradient, train=False)
        if wide:
            output = output.map_scores(Tensor.double)
        losses, scores = self.measure(output, self.batch)
        self.forwards += 1
        if gradient:
            guide.gradient(losses.sum(), perturbations)
            self.backwards += 1
            if self.flat is None:
                self.flat = self._flat(perturbations)
        followed = losses.detach()
        own, scores = (followed, scores) if self.source is None else self._transferred(perturbations)
        self._keep(perturbations, own.to(self.losses), scores)
        return followed

    def round_images(self) -> None:
        """Take the scores of the worst cases as images of eight bits a channel; a no-op if no pixels are perturbed."""
        if not any(map(is_pixels, self.kept)):
            return
        rounded = {}
        for key, delta in self.kept.items():
            taken = delta
            if is_pixels(key):
                colours, mask = self._colours[key]
                taken = ((colours + delta) * _BYTES).round() / _BYTES - colours
                taken = taken if mask is None else taken * mask.unsqueeze(-1)
            rounded[key] = _frozen(self._settings[key], taken)
        output = self.passes.forward(self.batch, rounded, grad=False, train=False)
        losses, self.scores = self.measure(output, self.batch)
        self.losses = losses.to(self.losses)
        self.forwards += 1

    def worst(self) -> ModelOutput:
        """Return the output at the worst cases so far."""
        kept = {key: _frozen(self._settings[key], delta) for key, delta in self.kept.items()}
        return self.passes.forward(self.batch, kept, grad=False, train=False)

    def clean(self) -> tuple[Tensor, Tensor]:
        """Return losses and scores ``[B]`` without a perturbation."""
        losses, scores = self.measure(self.passes.forward(self.batch, grad=False, train=False), self.batch)
        return losses.to(self.losses), scores

    def _transferred(self, perturbations: Mapping[str, Perturbation]) -> tuple[Tensor, Tensor]:
        """Return losses and scores of the model itself."""
        copies = {name: _frozen(p.settings, p.delta) for name, p in perturbations.items()}
        self.forwards += 1
        return self.measure(self.passes.forward(self.batch, copies, grad=False, train=False), self.batch)

    def _flat(self, perturbations: Mapping[str, Perturbation]) -> Tensor:
        sums = torch.zeros(len(self.batch), dtype=torch.float64)
        for perturbation in perturbations.values():
            grad = perturbation.trained().grad
            if grad is not None:
                sums += grad.double().abs().flatten(1).sum(1).view(len(self.batch), -1).sum(1).cpu()
        return ~(sums.isfinite() & (sums > 0))

    def _keep(self, perturbations: Mapping[str, Perturbation], losses: Tensor, scores: Tensor) -> None:
        better = (scores < self.scores) | ((scores == self.scores) & (losses > self.losses))
        self.scores = torch.where(better, scores, self.scores)
        self.losses = torch.where(better, losses, self.losses)
        for name, perturbation in perturbations.items():
            assert perturbation.delta is not None
            assert perturbation.relative_sizes is not None
            delta = perturbation.delta.detach()
            each = rows_of_each(len(delta), len(better))
            rows = better.repeat_interleave(each).view(-1, *[1] * (delta.dim() - 1)).to(delta.device)
            self.kept[name] = torch.where(rows, delta, self.kept.get(name, torch.zeros_like(delta)))
            self._settings[name] = perturbation.settings
            if is_pixels(name):
                assert perturbation.bounds is not None
                self._colours[name] = (-perturbation.bounds[0], perturbation.mask)
            sizes = perturbation.relative_sizes.double().cpu().view(len(better), each).amax(1)
            self.sizes[name] = torch.where(better, sizes, self.sizes.get(name, torch.zeros_like(sizes)))


def _frozen(settings: AscentSettings, delta: Tensor | None) -> Perturbation:
    """Return a perturbation to add without a gradient."""
    perturbation = Perturbation(settings, initial=delta)
    perturbation.frozen = True
    return perturbation
