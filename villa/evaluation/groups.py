"""Metrics of examples that belong together: rephrasings of a question, contrasts of a sentence, subsets of a split."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import comb
from typing import ClassVar

import torch
from torch import Tensor

from villa.batch import Batch
from villa.errors import DataError
from villa.evaluation.metrics import Metric, answer_scores, number_of
from villa.facts import GroupReference
from villa.models.base import ModelOutput
from villa.registry import register_metric

#: Sizes of the subsets of a group for consensus scores.
SIZES = (1, 2, 3, 4)


def consensus_scores(groups: Iterable[Sequence[float]], k: int) -> list[float]:
    """Return the share of each group's subsets of ``k`` questions that are all answered correctly.

    Their mean is the consensus score CS(k) of VQA-Rephrasings (Shah et al., 2019). A question is answered correctly if
    its score, the VQA accuracy, is above 0. Groups with fewer than ``k`` questions have no such subset and are skipped.

    Args:
        groups: scores of the questions of each group.
        k: size of the subsets, at least 1.
    """
    correct = ((sum(score > 0 for score in scores), len(scores)) for scores in groups)
    return [comb(right, k) / comb(size, k) for right, size in correct if size >= k]


@dataclass(frozen=True)
class Clusters:
    """Scores whose mean is a value, in clusters that a bootstrap draws as a whole.

    Attributes:
        means: mean score of each cluster.
        sizes: its number of scores.
    """

    means: list[float]
    sizes: list[int]

    @classmethod
    def of(cls, clusters: Sequence[Sequence[float]]) -> Clusters:
        """Make clusters of scores, none of them empty."""
        return cls([sum(scores) / len(scores) for scores in clusters], list(map(len, clusters)))

    @property
    def mean(self) -> float:
        """Mean of all scores."""
        return sum(mean * size for mean, size in zip(self.means, self.sizes, strict=True)) / sum(self.sizes)


@dataclass(frozen=True)
class Membership:
    """What an example belongs to.

    Attributes:
        key: number of its group, or of the example itself if it has none; the same in every process.
        grouped: whether it has a group.
        subsets: names of its subsets.
    """

    key: int
    grouped: bool
    subsets: tuple[str, ...]


class GroupMetric(Metric):
    """A metric of groups or subsets; a subclass names it and clusters the scores.

    Records name the ``group`` and the ``subsets`` of their examples. Data without these have no such value.
    """

    name: ClassVar[str]
    of_examples: ClassVar[bool] = False

    def __init__(self) -> None:
        self.reset()

    @abstractmethod
    def clusters(self) -> dict[str, Clusters]:
        """Return the scores that each value is the mean of; nothing if no example has what is measured."""

    def update(self, output: ModelOutput, batch: Batch) -> None:
        """Score the batch's examples."""
        self._scores.append(answer_scores(output, batch, self.name))
        references = batch.references or [None] * len(batch)
        self._members += [self._member(*pair) for pair in zip(batch.ids, references, strict=True)]

    def _member(self, id_: str, reference: object) -> Membership:
        given = reference if isinstance(reference, GroupReference) else GroupReference(None, [])
        group, subsets = given.group, given.subsets
        where = f"metric '{self.name}': example '{id_}'"
        if not (group is None or (isinstance(group, str | int) and not isinstance(group, bool))):
            raise DataError(f"{where} has the group {group!r:.40}; it must be a text or a number")
        if not isinstance(subsets, list) or not all(isinstance(name, str) for name in subsets):
            raise DataError(f"{where} has the subsets {subsets!r:.40}; they must be a list of names")
        key = f"example {id_}" if group is None else f"group {group}"
        return Membership(number_of(key), group is not None, tuple(subsets))

    def compute(self) -> dict[str, float]:
        """Return the mean of each value."""
        if not self._members:
            raise DataError(f"metric '{self.name}': no examples were evaluated; is the split empty?")
        return {name: clusters.mean for name, clusters in self.clusters().items()}

    def reset(self) -> None:
        """Discard all scores."""
        self._scores: list[Tensor] = []
        self._members: list[Membership] = []

    def state(self) -> Tensor:
        """Return the names of the subsets as a JSON text in bytes, after their number, and a row for each example."""
        names = sorted({name for member in self._members for name in member.subsets})
        text = json.dumps(names).encode()
        rows = [
            [score, member.key, member.grouped, *(name in member.subsets for name in names)]
            for score, member in zip(torch.cat(self._scores).tolist(), self._members, strict=True)
        ]
        return torch.tensor([len(text), *text, *chain.from_iterable(rows)], dtype=torch.float64)

    def load_states(self, states: Sequence[Tensor]) -> None:
        """Replace the examples by those of several ranks."""
        self.reset()
        for state in states:
            end = 1 + int(state[0])
            names: list[str] = json.loads(bytes(state[1:end].to(torch.uint8).tolist()))
            table = state[end:].reshape(-1, 3 + len(names))
            self._scores.append(table[:, 0])
            for key, grouped, *within in table[:, 1:].tolist():
                subsets = tuple(name for name, inside in zip(names, within, strict=True) if inside)
                self._members.append(Membership(int(key), bool(grouped), subsets))

    def gathered(self, chosen: Callable[[Membership], bool]) -> list[list[float]]:
        """Return the scores of the chosen examples by group, in an order that depends on the groups alone."""
        found: dict[int, list[float]] = {}
        for score, member in zip(torch.cat(self._scores).tolist(), self._members, strict=True):
            if chosen(member):
                found.setdefault(member.key, []).append(score)
        return [sorted(found[key]) for key in sorted(found)]


@register_metric("consensus")
class Consensus(GroupMetric):
    """Consensus scores CS(1) to CS(4), ``consensus_1``, ..., ``consensus_4``; ``consensus`` is the mean of the four.

    CS(k) is the share of a group's subsets of k questions that are all answered correctly: see ``consensus_scores``.
    Groups with fewer than k questions do not count in it, and have the mean of fewer scores.
    """

    name = "consensus"

    def clusters(self) -> dict[str, Clusters]:
        """Return the scores of every group."""
        groups = self.gathered(lambda member: member.grouped)
        each = {k: consensus_scores(groups, k) for k in SIZES}
        values = [[score for k in SIZES for score in consensus_scores([group], k)] for group in groups]
        found = {self.name: [sum(scores) / len(scores) for scores in values]}
        found |= {f"{self.name}_{k}": scores for k, scores in each.items()}
        return {name: Clusters(scores, [1] * len(scores)) for name, scores in found.items() if scores}


@register_metric("consistency")
class Consistency(GroupMetric):
    """Share of groups whose examples are all answered correctly, such as a sentence of NLVR2 and its contrasts."""

    name = "consistency"

    def clusters(self) -> dict[str, Clusters]:
        """Return whether each group is right."""
        right = [float(min(scores) > 0) for scores in self.gathered(lambda member: member.grouped)]
        return {self.name: Clusters(right, [1] * len(right))} if right else {}


@register_metric("subsets")
class Subsets(GroupMetric):
    """The score of the split, and that of each of its subsets: ``subsets``, ``subsets_<name>``.

    Subsets are in the order of their names, ``tail_2`` before ``tail_10``. An answer scores as in ``soft_accuracy``,
    ``accuracy`` or ``exact_match``, whichever suits the targets.
    """

    name = "subsets"

    def clusters(self) -> dict[str, Clusters]:
        """Return the scores of all examples, and of those in each subset, by group."""
        names = sorted({name for member in self._members for name in member.subsets}, key=_in_order)
        if not names:
            return {}
        found = {self.name: Clusters.of(self.gathered(lambda member: True))}
        for name in names:
            found[f"{self.name}_{name}"] = Clusters.of(self.gathered(partial(_within, name)))
        return found


def _in_order(name: str) -> tuple[str, float, str]:
    """Return a key that sorts names by the numbers at their ends."""
    numbered = re.fullmatch(r"(.*?)(-?\d+(?:\.\d+)?)", name)
    return (numbered[1], float(numbered[2]), name) if numbered else (name, 0.0, name)


def _within(name: str, member: Membership) -> bool:
    return name in member.subsets


@register_metric("gqa_ood")
class GqaOod(Subsets):
    """GQA-OOD: accuracy on all questions, on those with frequent (``head``) and rare (``tail``) answers, and ``delta``.

    Delta is (head - tail) / tail: how much better a model does on frequent answers.
    """

    name = "gqa_ood"

    def compute(self) -> dict[str, float]:
        """Return the accuracies and, unless that of the tail is 0, delta."""
        values = super().compute()
        head, tail = (values.get(f"{self.name}_{subset}") for subset in ("head", "tail"))
        return {**values, f"{self.name}_delta": (head - tail) / tail} if head is not None and tail else values
