"""The words of an example's text, be it written or in word-pieces, and others in their place."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from tokenizers import Tokenizer
from torch import Tensor

from villa.config.schema import TextChangesConfig
from villa.datasets.base import Example, in_form_of, parts_of
from villa.datasets.text import tokenizer_of
from villa.errors import DataError
from villa.facts import DataFacts

#: A word of a text: letters and digits, with apostrophes and hyphens inside.
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
#: What marks the beginning of a word in the names of tokens (BPE of bytes, SentencePiece), and its end (CLIP's BPE).
_BEGINNINGS, _END = ("Ġ", "▁"), "</w>"
_CONTINUED = "##"

#: Words by place, to be put where others are; None leaves one out.
Changes = Mapping[int, str | None]


class Wording(ABC):
    """The words of an example, in order.

    Attributes:
        words: the words.
    """

    words: tuple[str, ...]

    @abstractmethod
    def example(self, changes: Changes) -> Example:
        """Return the example with other words; without changes, itself."""

    @abstractmethod
    def text(self, changes: Changes) -> str:
        """Return the text with other words, for people; two texts are separated by a bar."""


class WrittenWords(Wording):
    """Words of a text as it is written; what is between them stays.

    Args:
        example: an example with a text, or two.
    """

    def __init__(self, example: Example) -> None:
        self._example = example
        self._texts = [text for text in (example.text, example.pair) if text is not None]
        self._spans = [(number, *m.span()) for number, text in enumerate(self._texts) for m in _WORD.finditer(text)]
        self.words = tuple(self._texts[number][start:end] for number, start, end in self._spans)

    def example(self, changes: Changes) -> Example:
        """Return the example with other words."""
        if not changes:
            return self._example
        texts = self._changed(changes)
        return replace(self._example, text=texts[0], pair=texts[1] if len(texts) > 1 else None)

    def text(self, changes: Changes) -> str:
        """Return the text with other words."""
        return " | ".join(self._changed(changes))

    def _changed(self, changes: Changes) -> list[str]:
        texts = list(self._texts)
        for place in sorted(changes, reverse=True):  # from the end, so that earlier places stay
            (number, start, end), word, text = self._spans[place], changes[place], texts[self._spans[place][0]]
            before, after = text[:start], text[end:]
            texts[number] = before + word + after if word is not None else before.removesuffix(" ") + after
        return [text.strip() for text in texts]


class PieceWords(Wording):
    """Words of token ids: a word-piece with those that continue it. Special tokens are no words.

    Args:
        example: an example with token ids.
        vocabulary: names and makes word-pieces.
        limit: length that a text with new words is cut to, special tokens included, if it was not longer before.
    """

    def __init__(self, example: Example, vocabulary: Vocabulary, limit: int) -> None:
        self._example, self._vocabulary, self._limit = example, vocabulary, limit
        self._parts = [part.tolist() for part in parts_of(example.input_ids)]
        self._runs = [list(vocabulary.runs(part)) for part in self._parts]
        self._places = [
            (part, run)
            for part, runs in enumerate(self._runs)
            for run, (start, end) in enumerate(runs)
            if _WORD.fullmatch(vocabulary.surface(self._parts[part][start:end]))
        ]
        self.words = tuple(self._surface(*place) for place in self._places)

    def example(self, changes: Changes) -> Example:
        """Return the example with the pieces of other words."""
        if not changes:
            return self._example
        types = [part.tolist() for part in parts_of(self._example.token_type_ids)]
        ids: list[Tensor] = []
        new_types: list[Tensor] = []
        for part in range(len(self._parts)):
            row, kinds = self._rebuilt(part, changes, types[part] if types else None)
            ids.append(torch.tensor(row))
            new_types.append(torch.tensor(kinds))
        return replace(
            self._example,
            input_ids=in_form_of(self._example.input_ids, ids),
            token_type_ids=in_form_of(self._example.token_type_ids, new_types),
        )

    def text(self, changes: Changes) -> str:
        """Return the text with other words; punctuation stands alone."""
        new = self._by_run(changes)
        texts = []
        for part, runs in enumerate(self._runs):
            shown = [new.get((part, run), self._surface(part, run)) for run in range(len(runs))]
            texts.append(" ".join(word for word in shown if word).strip("| "))
        return " | ".join(texts)

    def _surface(self, part: int, run: int) -> str:
        start, end = self._runs[part][run]
        return self._vocabulary.surface(self._parts[part][start:end])

    def _by_run(self, changes: Changes) -> dict[tuple[int, int], str]:
        return {self._places[place]: word or "" for place, word in changes.items()}

    def _rebuilt(self, part: int, changes: Changes, types: list[int] | None) -> tuple[list[int], list[int]]:
        """Return the ids and types of a text with other words; a new word has the type of the old one."""
        new, old = self._by_run(changes), self._parts[part]
        ids: list[int] = []
        kinds: list[int] = []
        for run, (start, end) in enumerate(self._runs[part]):
            word = new.get((part, run))
            pieces = old[start:end] if word is None else self._vocabulary.pieces(word)
            ids += pieces
            kinds += [types[start]] * len(pieces) if types else []
        most = max(len(old), self._limit)
        return (ids[: most - 1] + ids[-1:], kinds[: most - 1] + kinds[-1:]) if len(ids) > most else (ids, kinds)


class Vocabulary:
    """The names of token ids.

    Args:
        tokens: tokens by id; None for an unused one.

    Raises:
        DataError: they are not word-pieces.
    """

    def __init__(self, tokens: Sequence[str | None]) -> None:
        self._tokens = tokens
        self._tokenizer: Tokenizer = tokenizer_of(tokens)

    def runs(self, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield the first and last place (exclusive) of every word, special token or other sign."""
        start = 0
        for place in range(1, len(ids) + 1):
            name = self._tokens[ids[place]] if place < len(ids) else None
            if place == len(ids) or name is None or not name.startswith(_CONTINUED):
                yield start, place
                start = place

    def surface(self, ids: Sequence[int]) -> str:
        """Return a word as it is written; a special token is a bar."""
        names = [self._tokens[number] or "?" for number in ids]
        if len(names) == 1 and is_special(names[0]):
            return "|" if names[0] != "[UNK]" else names[0]
        return "".join(name.removeprefix(_CONTINUED) for name in names)

    def pieces(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def is_special(token: str) -> bool:
    """Return whether a token's name is one like ``[CLS]`` or ``<s>``."""
    return len(token) > 2 and token[0] in "[<" and token[-1] in "]>"


def whole_words(tokens: Sequence[str | None]) -> dict[str, int]:
    """Return the words of at least two letters that are one token, with their ids."""
    names = [token or "" for token in tokens]
    marks = [mark for mark in _BEGINNINGS if any(name.startswith(mark) for name in names)]
    ends = any(name.endswith(_END) for name in names)
    found: dict[str, int] = {}
    for number, name in enumerate(names):
        word = name.removesuffix(_END) if ends and name.endswith(_END) else name
        word = next((name[1:] for mark in marks if name.startswith(mark)), word)
        marked = word != name or not (marks or ends)
        if marked and len(word) > 1 and word.isalpha() and not is_special(name):
            found.setdefault(word, number)
    return found


@dataclass(frozen=True)
class Texts:
    """What changes of texts need: options, the vocabulary of the data, and the model's word embeddings.

    Attributes:
        options: the options.
        facts: sizes and names of the data.
        limit: length that changed texts are cut to, in tokens; 0 for that of the original.
        look_up: returns the model's embedding table ``[entries, width]``, or None if it has none.
        seed: seed of all draws.
    """

    options: TextChangesConfig
    facts: DataFacts
    limit: int
    look_up: Callable[[], Tensor | None]
    seed: int

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The word-pieces of the data.

        Raises:
            DataError: their names are not known.
        """
        if self.facts.tokens is None:
            raise DataError(
                "the examples are token ids whose words are not known, for the data have no vocabulary; use a data set "
                "with a tokenizer or processor, or leave changes of words out"
            )
        return Vocabulary(self.facts.tokens)

    @cached_property
    def table(self) -> Tensor | None:
        """The model's word embeddings ``[entries, width]``, or None."""
        return self.look_up()

    def wording(self, example: Example) -> Wording:
        """Return the words of an example.

        Raises:
            DataError: it has token ids whose names are not known.
        """
        if example.input_ids is None:
            return WrittenWords(example)
        return PieceWords(example, self.vocabulary, self.limit)
