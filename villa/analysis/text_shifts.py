"""Shifts of words: misspellings, synonyms, and other wordings from a file."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, TypeVar

import torch

from villa.analysis.candidates import Synonyms, misspellings
from villa.analysis.shifts import SHARES, Shift
from villa.analysis.words import Texts
from villa.datasets.base import Example
from villa.datasets.own.records import JsonLines
from villa.errors import DataError
from villa.files import read_json
from villa.registry import register_shift

T = TypeVar("T")


class _WordShift(Shift):
    """Puts other words in the place of 10 to 50 % of those that have any; at least one."""

    modality: ClassVar[str] = "text"
    _texts: Texts

    def prepare(self, texts: Texts) -> None:
        """Take the vocabulary."""
        self._texts = texts

    def apply(self, example: Example, severity: int, draws: torch.Generator, other: Callable[[], Example]) -> Example:
        """Replace words."""
        wording = self._texts.wording(example)
        places = [place for place, word in enumerate(wording.words) if self.able(word)]
        count = min(len(places), max(1, round(SHARES[severity - 1] * len(wording.words))))
        drawn = torch.randperm(len(places), generator=draws)[:count].tolist()
        return wording.example({places[n]: self.draw(wording.words[places[n]], draws) for n in sorted(drawn)})

    @abstractmethod
    def able(self, word: str) -> bool:
        """Return whether there is a word to take the place of another."""

    @abstractmethod
    def draw(self, word: str, draws: torch.Generator) -> str:
        """Return a word to take the place of another, which is ``able``."""


@register_shift("char_noise")
class CharNoise(_WordShift):
    """Misspells 10 to 50 % of the words: letters are swapped, left out, or hit with a key beside."""

    def able(self, word: str) -> bool:
        """Return whether a word is long enough."""
        return bool(misspellings(word))

    def draw(self, word: str, draws: torch.Generator) -> str:
        """Draw a kind of slip, then its place."""
        return _pick(_pick([*misspellings(word).values()], draws), draws)


@register_shift("synonyms")
class SynonymShift(_WordShift):
    """Replaces 10 to 50 % of the words by neighbours in the embedding table, if they have any."""

    def prepare(self, texts: Texts) -> None:
        """Take the embeddings, or the file that the recipe names."""
        super().prepare(texts)
        self._synonyms = Synonyms(texts)

    def able(self, word: str) -> bool:
        """Return whether a word has neighbours."""
        return bool(self._synonyms.of(word))

    def draw(self, word: str, draws: torch.Generator) -> str:
        """Draw a neighbour."""
        return _pick([other for other, _ in self._synonyms.of(word)], draws)


def _pick(options: list[T], draws: torch.Generator) -> T:
    return options[int(torch.randint(len(options), (), generator=draws))]


def read_rephrasings(path: Path) -> dict[str, list[str]]:
    """Read other wordings of examples by id: ``{id: [texts]}``, or a line for each, ``{"id": ..., "text": ...}``.

    Raises:
        DataError: naming the first bad line.
    """
    found: dict[str, list[str]] = {}
    for where, record in _records(path):
        for id_, texts in _rephrasings(record):
            named = isinstance(id_, str | int) and not isinstance(id_, bool)
            if not named or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                raise DataError(f'{where}: no rephrasings; give {{id: [texts]}}, or {{"id": ..., "text": ...}}')
            found.setdefault(str(id_), []).extend(map(str, texts))
    return found


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yield the objects of JSON lines, or of a single JSON value, with their places."""
    if path.suffix != ".json":
        lines = JsonLines(path)
        yield from ((lines.where(number), record) for number, record in enumerate(lines))
        return
    value = read_json(path, "file of rephrasings", "give {id: [texts]}")
    rows = value if isinstance(value, list) else [value]
    yield from ((f"'{path}'", row if isinstance(row, dict) else {"": []}) for row in rows)


def _rephrasings(record: Mapping[str, object]) -> Iterable[tuple[object, list[object]]]:
    if record.keys() >= {"id", "text"}:
        return [(record["id"], [record["text"]])]
    return [(id_, texts if isinstance(texts, list) else []) for id_, texts in record.items()]


def rephrased(texts: Texts, example: Example, text: str) -> Example:
    """Return an example with another text.

    Raises:
        DataError: it has several texts.
    """
    if example.input_ids is None and example.pair is None:
        return replace(example, text=text)
    if example.input_ids is None or isinstance(example.input_ids, tuple) or example.token_type_ids is not None:
        raise DataError(f"'{example.id}' has several texts, so that a rephrasing cannot take their place; leave it out")
    row = example.input_ids
    pieces = texts.vocabulary.pieces(text)[: max(len(row), texts.limit) - 2]
    return replace(example, input_ids=torch.cat((row[:1], torch.tensor(pieces, dtype=row.dtype), row[-1:])))
