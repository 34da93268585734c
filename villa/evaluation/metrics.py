"""Metrics over a whole split, accumulated on the device so that no batch waits for the host."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from villa.batch import Batch
from villa.errors import DataError
from villa.facts import CHOICES, Box, RegionReference, VcrReference
from villa.models.base import ModelOutput
from villa.objectives import OBJECTIVES
from villa.registry import register_metric


class Metric(ABC):
    """One or a few values that summarise a split. ``@register_metric(name)`` registers a subclass.

    Attributes:
        higher_is_better: whether higher values are better.
        of_examples: whether the value of a split is the mean of its examples' own values.
    """

    higher_is_better: ClassVar[bool] = True
    of_examples: ClassVar[bool] = True

    @abstractmethod
    def update(self, output: ModelOutput, batch: Batch) -> None:
        """Accumulate one batch.

        Raises:
            DataError: the targets are missing or of a form that this metric cannot score.
        """

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Return the values in [0, 1] by name; the first is named like the metric.

        Raises:
            DataError: no examples were evaluated.
        """

    @abstractmethod
    def reset(self) -> None:
        """Discard everything accumulated."""

    @abstractmethod
    def state(self) -> Tensor:
        """Return the accumulated state as a float64 tensor."""

    @abstractmethod
    def load_states(self, states: Sequence[Tensor]) -> None:
        """Replace the state by the combined states of several ranks."""


def number_of(key: str) -> int:
    """Hash a key to an integer that is the same in every process and exact in float64."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big")


class MeanScore(Metric):
    """Mean over examples of a score in [0, 1]; a subclass names it, scores a batch and calls ``add``.

    Attributes:
        latest: the scores that were added last, until they are taken.
    """

    name: ClassVar[str]
    latest: Tensor | None

    _sum: Tensor
    _count: int

    def __init__(self) -> None:
        self.reset()

    def add(self, scores: Tensor) -> None:
        """Accumulate the scores ``[B]`` of a batch."""
        self.latest = scores
        self._sum = self._sum + scores.sum(dtype=torch.float64)
        self._count += len(scores)

    def take(self) -> list[float]:
        """Return the scores of the last batch, once; nothing if it was not scored."""
        latest, self.latest = self.latest, None
        return [] if latest is None else latest.tolist()

    def compute(self) -> dict[str, float]:
        """Return the mean by name."""
        if not self._count:
            raise DataError(f"metric '{self.name}': no examples were evaluated; is the split empty?")
        return {self.name: self._sum.item() / self._count}

    def reset(self) -> None:
        """Reset sum and count."""
        self.latest = None
        self._sum = torch.zeros((), dtype=torch.float64)
        self._count = 0

    def state(self) -> Tensor:
        """Return ``[sum, count]``."""
        return torch.stack((self._sum, self._sum.new_tensor(self._count)))

    def load_states(self, states: Sequence[Tensor]) -> None:
        """Replace sum and count by their totals over ranks."""
        state = torch.stack(list(states)).sum(0)
        self._sum, self._count = state[0], round(state[1].item())


class TargetScore(MeanScore):
    """Mean of a score that compares logits with targets."""

    @abstractmethod
    def scores(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return scores ``[B]`` for logits ``[B, labels]`` and the batch's targets."""

    def update(self, output: ModelOutput, batch: Batch) -> None:
        """Add the batch's scores."""
        self.add(self.scores(output.logits.detach(), required_targets(batch, self.name)))


def required_targets(batch: Batch, metric: str) -> Tensor:
    """Return the targets of a batch.

    Raises:
        DataError: it has none.
    """
    if batch.targets is None:
        raise DataError(
            f"metric '{metric}': the examples have no targets (first: '{batch.ids[0]}'); evaluate a split that has "
            "answers"
        )
    return batch.targets


@register_metric("accuracy")
class Accuracy(TargetScore):
    """Share of examples whose highest logit is the target: logits ``[B, labels]``, targets int64 ``[B]``."""

    name = "accuracy"

    def scores(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return whether the argmax is the target."""
        if targets.is_floating_point() or targets.shape != logits.shape[:-1] or logits.dim() != 2:
            raise DataError(
                f"metric 'accuracy' needs one class index per row of logits {list(logits.shape)}; "
                f"the targets are {_describe(targets)}; use 'soft_accuracy' for soft targets"
            )
        return logits.argmax(-1) == targets


@register_metric("soft_accuracy")
class SoftAccuracy(TargetScore):
    """VQA accuracy: the soft score of the answer with the highest logit (min(annotators / 3, 1) in VQA v2).

    Logits and targets are ``[B, labels]``; targets are floats in [0, 1].
    """

    name = "soft_accuracy"

    def scores(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the target score of the argmax."""
        if not targets.is_floating_point() or targets.shape != logits.shape or logits.dim() != 2:
            raise DataError(
                f"metric 'soft_accuracy' needs a score for each of the logits {list(logits.shape)}; "
                f"the targets are {_describe(targets)}; use 'accuracy' for class indices"
            )
        return targets.gather(1, logits.argmax(-1, keepdim=True)).squeeze(1)


def _describe(targets: Tensor) -> str:
    """Return ``int64 [8]``."""
    return f"{str(targets.dtype).removeprefix('torch.')} {list(targets.shape)}"


@register_metric("exact_match")
class ExactMatch(MeanScore):
    """Share of examples whose target text greedy decoding generates exactly.

    Nothing is generated: greedy decoding generates the target, end included, exactly if every target token has the
    highest logit given the target tokens before it. Logits are ``[N, vocabulary]``, targets ``[N]``.
    """

    name = "exact_match"

    def update(self, output: ModelOutput, batch: Batch) -> None:
        """Add the batch's scores."""
        self.add(self.scores(output, batch))

    def scores(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return whether each text ``[B]`` is generated exactly."""
        mask, targets = batch.answer_mask, batch.targets
        if mask is None or targets is None or targets.numel() != len(output.logits):
            raise DataError(
                f"metric 'exact_match' needs the tokens of an answer for each example (first: '{batch.ids[0]}'); set "
                "dataset.target=text, and a model that writes"
            )
        wrong = (output.logits.detach().argmax(-1) != targets.flatten()).long()
        rows = mask.nonzero()[:, 0]
        mistakes = torch.zeros(len(batch), dtype=torch.long, device=rows.device).index_add(0, rows, wrong)
        return mistakes == 0


def answer_scores(output: ModelOutput, batch: Batch, metric: str) -> Tensor:
    """Return the score of the answer to each example ``[B]``, float64, by the metric that suits the targets.

    Texts are scored by ``exact_match``, soft targets by ``soft_accuracy``, classes by ``accuracy``.

    Raises:
        DataError: the examples have no targets; ``metric`` is named.
    """
    targets = required_targets(batch, metric)
    if batch.answer_mask is not None:
        return ExactMatch().scores(output, batch).double()
    kind = SoftAccuracy if targets.is_floating_point() else Accuracy
    return kind().scores(output.logits.detach(), targets).double()


#: A chosen box is correct if its intersection over union with the target box is above this.
RIGHT_ABOVE = 0.5


def box_iou(first: Box, second: Box) -> float:
    """Return the intersection over union of two boxes x, y, w, h in pixels.

    As in the released code, an intersection counts only if it is wider and higher than one pixel.
    """
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    shared = width * height if width > 1 and height > 1 else 0.0
    return shared / (first[2] * first[3] + second[2] * second[3] - shared)


@register_metric("referring")
class ReferringAccuracy(MeanScore):
    """Share of expressions whose highest-scored region has an IoU above 0.5 with the target box: logits ``[B, R]``."""

    name: ClassVar[str] = "referring"

    def update(self, output: ModelOutput, batch: Batch) -> None:
        """Add the batch's hits."""
        references = batch.references or [None]
        if not all(isinstance(r, RegionReference) and r.target is not None for r in references):
            raise DataError("metric 'referring' needs expressions with the box meant; evaluate a split that has them")
        chosen = output.logits.argmax(1).tolist()
        hits = [box_iou(r.boxes[i], r.target) > RIGHT_ABOVE for r, i in zip(references, chosen, strict=True)]
        self.add(torch.tensor(hits))


class ObjectiveAccuracy(MeanScore):
    """Share of the rows of logits ``[N, classes]`` whose argmax is the target.

    ``villa.objectives`` names the metric of each objective; data without its objectives have no such value.
    """

    def update(self, output: ModelOutput, batch: Batch) -> None:
        """Add the batch's rows, if it is for one of the objectives."""
        if batch.objective is None or OBJECTIVES[batch.objective].metric != self.name:
            return
        if batch.targets is None:
            raise DataError(f"metric '{self.name}': the examples have no targets (first: '{batch.ids[0]}')")
        self.add(output.logits.detach().argmax(-1) == self.right(batch.targets))

    def right(self, targets: Tensor) -> Tensor:
        """Return the correct class ``[N]`` of every row."""
        return targets

    def compute(self) -> dict[str, float]:
        """Return the share by name; nothing if no batch was for the objectives."""
        return super().compute() if self._count else {}


@register_metric("mlm_accuracy")
class MlmAccuracy(ObjectiveAccuracy):
    """Share of masked tokens predicted correctly."""

    name = "mlm_accuracy"


@register_metric("itm_accuracy")
class ItmAccuracy(ObjectiveAccuracy):
    """Share of text-image pairs correctly classified as matching or not."""

    name = "itm_accuracy"


@register_metric("mrc_accuracy")
class MrcAccuracy(ObjectiveAccuracy):
    """Share of masked regions whose predicted class is the detector's likeliest, not counting column 0 (background)."""

    name = "mrc_accuracy"

    def right(self, targets: Tensor) -> Tensor:
        """Return the detector's likeliest class, as in the loss ``mrc``."""
        return targets[:, 1:].argmax(-1) + 1 if targets.is_floating_point() else targets


@register_metric("vcr")
class VcrAccuracy(Metric):
    """Q -> AR (``vcr``: both right), Q -> A (``vcr_answer``) and QA -> R (``vcr_rationale``).

    Expects logits ``[B * S, 2]`` with a choice's score in column 1. S is 8 (answers, then rationales given the right
    answer) or 20 (answers, then rationales given each answer). Rationales are always judged given the right answer, as
    on the leaderboard.
    """

    _sums: Tensor
    _count: int

    def __init__(self) -> None:
        self.reset()

    def update(self, output: ModelOutput, batch: Batch) -> None:
        """Add the batch's right choices."""
        references = batch.references or []
        if not all(isinstance(r, VcrReference) and None not in (r.answer, r.rationale) for r in references or [None]):
            raise DataError("metric 'vcr' needs VCR questions with answers; evaluate a split that has them")
        scores = output.logits.detach()[:, 1].reshape(len(references), -1)
        answers = torch.tensor([r.answer for r in references], device=scores.device)
        rationales = torch.tensor([r.rationale for r in references], device=scores.device)
        answered = scores[:, :CHOICES].argmax(1) == answers
        explained = given_answer(scores, answers).argmax(1) == rationales
        sums = torch.stack((answered & explained, answered, explained)).sum(1, dtype=torch.float64)
        self._sums = self._sums.to(sums.device) + sums
        self._count += len(references)

    def compute(self) -> dict[str, float]:
        """Return the three shares."""
        if not self._count:
            raise DataError("metric 'vcr': no examples were evaluated; is the split empty?")
        names = ("vcr", "vcr_answer", "vcr_rationale")
        return {name: total / self._count for name, total in zip(names, self._sums.tolist(), strict=True)}

    def reset(self) -> None:
        """Reset sums and count."""
        self._sums = torch.zeros(3, dtype=torch.float64)
        self._count = 0

    def state(self) -> Tensor:
        """Return the three sums and the count."""
        return torch.cat((self._sums, self._sums.new_tensor([self._count])))

    def load_states(self, states: Sequence[Tensor]) -> None:
        """Replace sums and count by their totals over ranks."""
        state = torch.stack(list(states)).sum(0)
        self._sums, self._count = state[:3], round(state[3].item())


def given_answer(scores: Tensor, answers: Tensor) -> Tensor:
    """Return the scores of the rationales given an answer.

    Args:
        scores: ``[B, 8]`` or ``[B, 20]``.
        answers: ``[B]``; ignored for 8 scores, whose rationales are those of the right answer.

    Returns:
        ``[B, 4]``.
    """
    rationales = scores[:, CHOICES:].unflatten(1, (-1, CHOICES))  # type: ignore[no-untyped-call]
    chosen: Tensor = rationales[torch.arange(len(scores)), answers if rationales.shape[1] > 1 else 0]
    return chosen
