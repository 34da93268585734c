"""Searches over the words of examples: what they ask is run in passes, and the worst texts are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from villa.adversarial.ascent import AscentSettings
from villa.adversarial.perturbation import Perturbation
from villa.analysis.robustness import Outcome
from villa.analysis.victim import Victim
from villa.analysis.word_attacks import Answer, Query, Search, WordAttack
from villa.analysis.words import Changes
from villa.datasets.base import Example

#: Most texts in a pass.
AT_ONCE = 32


class Start(NamedTuple):
    """An example to attack, with its score as it is, and its loss; None if that is not known yet."""

    example: Example
    loss: float | None
    score: float


#: Runs texts of one example: returns their losses and scores and, if asked for, the gradient of a single one.
Run: TypeAlias = Callable[[Sequence[Example], bool], Answer]


def runner(
    make: Callable[[Sequence[Example]], Victim], source: Callable[[Sequence[Example]], Victim] | None = None
) -> Run:
    """Return what runs texts of one example.

    Args:
        make: makes a victim of texts.
        source: makes one of another model, whose losses and gradients are followed; scores are the victim's own.
    """

    def run(examples: Sequence[Example], gradient: bool) -> Answer:
        guide = (source or make)(examples)
        still = Perturbation(AscentSettings(step_size=0.0))
        losses, scores = (guide.run({"text": still}, gradient=True), guide.scores) if gradient else guide.clean()
        if source is not None:
            _, scores = make(examples).clean()
        answer = Answer(losses.tolist(), scores.tolist())
        slope, ids = still.trained().grad if gradient else None, guide.batch.input_ids
        if slope is None or ids is None:
            return answer
        return answer._replace(gradient=slope.detach().cpu().flatten(0, 1), ids=ids.cpu().flatten())

    return run


def words_of(budget: float, words: int) -> int:
    """Return how many words of a text may change: a share of them, rounded up, or a number."""
    return min(words, math.ceil(budget * words - 1e-9) if budget < 1 else int(budget))


def attack_words(
    attack: WordAttack, budgets: Sequence[float], starts: Sequence[Start], run: Run, agree: Callable[[bool], bool]
) -> list[Outcome]:
    """Search each example's words.

    Args:
        attack: the attack.
        budgets: how many words may change, ascending; see ``words_of``.
        starts: the examples, at least one.
        run: runs the model.
        agree: returns whether any process has work left, given whether this one has: all run as many passes.
    """
    talks = [_Talk(attack, budgets, start) for start in starts]
    stand_in = [starts[0].example]
    while True:
        talk = next((talk for talk in talks if talk.query is not None), None)
        if not agree(talk is not None):
            return [talk.outcome() for talk in talks]
        asks = talk is not None and talk.query is not None and talk.query.kind == "gradient"
        gradient = agree(asks)
        if talk is None or gradient != asks:
            run(stand_in, gradient)
        else:
            talk.take(run(talk.examples(), gradient))


@dataclass
class _Worst:
    """The worst text with so many changed words, its loss and its score."""

    changes: Changes
    loss: float
    score: float


class _Talk:
    """The search of one example, in parts of as many texts as a pass takes.

    Args:
        attack: the attack.
        budgets: how many words may change.
        start: the example.

    Attributes:
        query: what the search waits for; None when it is over.
    """

    def __init__(self, attack: WordAttack, budgets: Sequence[float], start: Start) -> None:
        self._attack, self._start = attack, start
        self._wording = attack.texts.wording(start.example)
        self._limits = [words_of(budget, len(self._wording.words)) for budget in budgets]
        self._search = self._begin()
        self._worst = {0: _Worst({}, start.loss or 0.0, start.score)}
        self._spent: dict[int, tuple[int, int]] = {}
        self._forwards = self._backwards = 0
        self._answers: list[Answer] = []
        self.query = next(self._search, None)

    def _begin(self) -> Search:
        """Yield the queries of the search, after one for the loss as it is if that is not known."""
        if self._start.loss is None:
            answer = yield Query([{}], "probe")
            self._worst[0] = _Worst({}, answer.losses[0], self._start.score)
        if self._limits[-1]:
            yield from self._attack.search(self._start.example.id, self._wording, self._limits[-1])

    def examples(self) -> list[Example]:
        """Return the texts of the next pass."""
        return [self._wording.example(changes) for changes in self._part()]

    def take(self, answer: Answer) -> None:
        """Take the answer for the texts of the pass; go on with the search when those of all texts are there."""
        assert self.query is not None
        part = self._part()
        self._forwards += len(part)
        self._backwards += self.query.kind == "gradient"
        self._answers.append(answer)
        if self.query.kind == "try":
            for changes, loss, score in zip(part, answer.losses, answer.scores, strict=True):
                self._keep(changes, loss, score)
        ahead = {"probe": 0, "gradient": len(part[0]) + 1, "try": max(map(len, part))}[self.query.kind]
        self._spent[ahead] = (self._forwards, self._backwards)
        if sum(len(one.losses) for one in self._answers) < len(self.query.texts):
            return
        whole, self._answers = _joined(self._answers), []
        fallen = min(worst.score for worst in self._worst.values()) <= 0
        try:
            self.query = None if fallen else self._search.send(whole)
        except StopIteration:
            self.query = None

    def outcome(self) -> Outcome:
        """Return the worst case within each budget."""
        found = [self._within(limit) for limit in self._limits]
        words, spent = self._wording.words, [self._spent_within(limit) for limit in self._limits]
        return Outcome(
            id=self._start.example.id,
            scores=[one.score for one in found],
            losses=[one.loss for one in found],
            sizes=[len(one.changes) / max(len(words), 1) for one in found],
            forwards=[forwards for forwards, _ in spent],
            backwards=[backwards for _, backwards in spent],
            flat=False,
            words=[len(one.changes) for one in found],
            texts=[self._wording.text(changes) for changes in ({}, *(one.changes for one in found))],
            similarities=[self._similarity(one.changes) for one in found],
        )

    def _part(self) -> Sequence[Changes]:
        assert self.query is not None
        begun = sum(len(one.losses) for one in self._answers)
        return self.query.texts[begun : begun + AT_ONCE]

    def _keep(self, changes: Changes, loss: float, score: float) -> None:
        before = self._worst.get(len(changes))
        if before is None or (score, -loss) < (before.score, -before.loss):
            self._worst[len(changes)] = _Worst(changes, loss, score)

    def _within(self, limit: int) -> _Worst:
        """Return the worst text of at most so many changes; the fewest if there are several."""
        able = [worst for count, worst in sorted(self._worst.items()) if count <= limit]
        return min(able, key=lambda worst: (worst.score, -worst.loss))

    def _spent_within(self, limit: int) -> tuple[int, int]:
        return max((spent for count, spent in self._spent.items() if count <= limit), default=(0, 0))

    def _similarity(self, changes: Changes) -> float | None:
        """Return the mean similarity of the words that changed, if it is known."""
        words = self._wording.words
        found = [self._attack.similarity(words[place], word) for place, word in changes.items() if word is not None]
        known = [value for value in found if value is not None]
        return sum(known) / len(known) if known else None


def _joined(answers: Sequence[Answer]) -> Answer:
    if len(answers) == 1:
        return answers[0]
    losses = [loss for answer in answers for loss in answer.losses]
    return Answer(losses, [score for answer in answers for score in answer.scores])
