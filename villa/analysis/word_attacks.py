"""Attacks on the words of an input: greedy by importance, or by the first order of the loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Sequence
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from villa.analysis.attacks import Method
from villa.analysis.candidates import MaskedWords, Synonyms, misspellings
from villa.analysis.words import Changes, Texts, Wording, whole_words
from villa.errors import ConfigError
from villa.registry import register_attack
from villa.rng import generator


class Query(NamedTuple):
    """What a search asks of the model.

    Attributes:
        texts: changes of the example's words.
        kind: ``try`` if each may be the outcome, ``probe`` if not, ``gradient`` for the gradient at a single one.
    """

    texts: Sequence[Changes]
    kind: Literal["try", "probe", "gradient"] = "try"


class Answer(NamedTuple):
    """Losses and scores of the texts of a query; of a single text, perhaps the gradient of its loss.

    Attributes:
        losses: what the attack raises.
        scores: what it lowers.
        gradient: ``[tokens, width]``, at the word embeddings.
        ids: token ids ``[tokens]`` of the text.
    """

    losses: list[float]
    scores: list[float]
    gradient: Tensor | None = None
    ids: Tensor | None = None

    def worst(self) -> int:
        """Return the place of the text with the lowest score and, among these, the highest loss."""
        return min(range(len(self.scores)), key=lambda place: (self.scores[place], -self.losses[place]))

    def hurts_more(self, place: int, losses: float, score: float) -> bool:
        """Return whether a text is worse for the model than one of this loss and score."""
        return (self.scores[place], -self.losses[place]) < (score, -losses)


Search: TypeAlias = Generator[Query, Answer, None]


class WordAttack(Method):
    """A search for the words that hurt most. ``@register_attack(name)`` registers a subclass.

    Each example is searched by itself. The search yields queries and is sent their answers; whoever runs it keeps the
    worst text for every number of changed words, and stops it when the score of an example is 0.

    Args:
        texts: what changes of texts need.

    Attributes:
        transferable: whether another model's losses and gradients may be followed.

    Raises:
        VillaError: the model or the data lack what the attack needs.
    """

    space = "words"
    transferable: ClassVar[bool] = True

    def __init__(self, texts: Texts) -> None:
        self.texts = texts
        self.similarity: Callable[[str, str], float | None] = lambda word, other: None

    @abstractmethod
    def search(self, id_: str, wording: Wording, most: int) -> Search:
        """Yield queries.

        Args:
            id_: the example's id, from which draws derive.
            wording: its words.
            most: how many may change.
        """

    def queries(self, words: int, most: int) -> tuple[int, int]:
        """Return the largest numbers of texts to run forward, and backward, for a text of so many words."""
        return 1 + words + most * self.texts.options.candidates, 0


class _Greedy(WordAttack):
    """Changes words in the order of their importance: how much the loss rises when a word is left out."""

    @abstractmethod
    def candidates(self, id_: str, wording: Wording) -> list[list[str]]:
        """Return the words that may take the place of each word."""

    def search(self, id_: str, wording: Wording, most: int) -> Search:
        """Rank the words, then give each the candidate that hurts most, if it hurts more than what was there."""
        options = self.candidates(id_, wording)
        places = [place for place, words in enumerate(options) if words]
        if not places:
            return
        without: list[Changes] = [{}, *({place: None} for place in places)]
        ranked = yield Query(without, "probe")
        rises = dict(zip(places, ranked.losses[1:], strict=True))
        changes: dict[int, str | None] = {}
        loss, score = ranked.losses[0], ranked.scores[0]
        for place in sorted(places, key=lambda place: -rises[place]):
            if len(changes) == most:
                return
            tried = [{**changes, place: word} for word in options[place]]
            answer = yield Query(tried)
            worst = answer.worst()
            if answer.hurts_more(worst, loss, score):
                changes, loss, score = tried[worst], answer.losses[worst], answer.scores[worst]


@register_attack("synonym_swap")
class SynonymSwap(_Greedy):
    """Greedy by importance, with neighbours in an embedding table (after TextFooler; Jin et al., AAAI 2020)."""

    def __init__(self, texts: Texts) -> None:
        super().__init__(texts)
        self._synonyms = Synonyms(texts)
        self.similarity = self._synonyms.similarity

    def candidates(self, id_: str, wording: Wording) -> list[list[str]]:
        """Return the neighbours of each word."""
        return [[other for other, _ in self._synonyms.of(word)] for word in wording.words]


@register_attack("masked_lm_swap")
class MaskedLmSwap(_Greedy):
    """Greedy by importance, with the words of a masked language model (after BERT-Attack; Li et al., EMNLP 2020)."""

    def __init__(self, texts: Texts) -> None:
        super().__init__(texts)
        self._words = MaskedWords(texts)

    def candidates(self, id_: str, wording: Wording) -> list[list[str]]:
        """Return the likeliest words at each place."""
        return self._words.of(wording)


@register_attack("misspelling")
class Misspelling(_Greedy):
    """Greedy by importance, with slips of the fingers (after DeepWordBug, Gao et al., 2018, and TextBugger)."""

    def candidates(self, id_: str, wording: Wording) -> list[list[str]]:
        """Return misspellings of each word, drawn if there are too many."""
        found = []
        for place, word in enumerate(wording.words):
            every = [other for its in misspellings(word).values() for other in its]
            draws = generator("misspelling", self.texts.seed, id_, place)
            picked = torch.randperm(len(every), generator=draws)[: self.texts.options.candidates]
            found.append([every[number] for number in sorted(picked.tolist())])
        return found


@register_attack("hotflip")
class HotFlip(WordAttack):
    """Word by word, the best of the neighbours that the gradient ranks first (after HotFlip; Ebrahimi et al., 2018)."""

    transferable = False  # the other model has a table of its own

    def __init__(self, texts: Texts) -> None:
        super().__init__(texts)
        self._synonyms = Synonyms(texts)
        self.similarity = self._synonyms.similarity
        self._rows = whole_words(texts.facts.tokens or ())
        if texts.table is None or not self._rows:
            raise ConfigError(
                "it needs the names of the rows of the model's embedding table, which this model or its data lack; use "
                "synonym_swap, with robustness.text.synonyms"
            )

    def search(self, id_: str, wording: Wording, most: int) -> Search:
        """Take the gradient, try the changes of one word that raise the loss most to the first order, and go on."""
        options = [[other for other, _ in self._synonyms.of(word)] for word in wording.words]
        changes: dict[int, str | None] = {}
        while len(changes) < most:
            there = yield Query([changes], "gradient")
            ranked = self._ranked(wording, changes, options, there)
            if not ranked:
                return
            tried = [{**changes, place: word} for place, word in ranked[: self.texts.options.candidates]]
            answer = yield Query(tried)
            worst = answer.worst()
            if not answer.hurts_more(worst, there.losses[0], there.scores[0]):
                return
            changes = tried[worst]

    def queries(self, words: int, most: int) -> tuple[int, int]:
        """Return a gradient and its candidates for every word."""
        return most * (1 + self.texts.options.candidates), most

    def _ranked(
        self, wording: Wording, changes: Changes, options: list[list[str]], there: Answer
    ) -> list[tuple[int, str]]:
        """Return places and words for them, by the first-order estimate of the loss."""
        table = self.texts.table
        assert there.gradient is not None
        assert there.ids is not None
        assert table is not None
        ids, after = there.ids.tolist(), 0
        estimates: dict[tuple[int, str], float] = {}
        for place, word in enumerate(wording.words):
            row = self._row(changes.get(place) or word)
            if row is None or row not in ids[after:]:
                continue  # not a single token, or cut off
            after = ids.index(row, after) + 1
            words = [other for other in options[place] if self._row(other) is not None]
            if place not in changes and words:
                rows = torch.tensor([self._row(other) for other in words])
                steps = (table[rows] - table[row]).double() @ there.gradient[after - 1].double()
                estimates |= {(place, other): step for other, step in zip(words, steps.tolist(), strict=True)}
        return sorted(estimates, key=lambda change: -estimates[change])

    def _row(self, word: str) -> int | None:
        return self._rows.get(word, self._rows.get(word.lower()))
