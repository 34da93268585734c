"""Words that may take the place of another: neighbours in an embedding table, a language model's, and misspellings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from villa.analysis.words import Texts, Wording, whole_words
from villa.errors import ConfigError, DataError
from villa.files import from_home, lines_of, read_json, read_text

#: Keys in their rows; the neighbours of a key are those beside, above and below it.
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
#: Fewest letters of a word that is misspelt; its first letter stays.
_LONG_ENOUGH = 3


class Synonyms:
    """Words that mean about the same, by the recipe: neighbours in the model's embedding table, or those of a file.

    Args:
        texts: options, vocabulary and the model's embeddings.

    Raises:
        ConfigError: the model has no embedding table whose rows have names.
        DataError: the file cannot be used.
    """

    def __init__(self, texts: Texts) -> None:
        self._texts, options = texts, texts.options
        self._listed: Mapping[str, Sequence[str]] = {}
        self.rows: dict[str, int] = {}
        self._kept = labels_of(texts) if options.keep_labels else frozenset()
        self._found: dict[str, list[tuple[str, float | None]]] = {}
        path = None if options.synonyms is None else from_home(options.synonyms)
        if path is not None and path.suffix == ".json":
            self._listed = _read_lists(path)
            return
        if path is not None:
            self.rows, vectors = _read_vectors(path)
        else:
            self.rows, vectors = _own_table(texts)
        self._names = {number: word for word, number in self.rows.items()}
        self._unit = F.normalize(vectors.float(), dim=-1)
        self._allowed = torch.zeros(len(vectors), dtype=torch.bool)
        self._allowed[[number for word, number in self.rows.items() if word.lower() not in self._kept]] = True

    def of(self, word: str) -> list[tuple[str, float | None]]:
        """Return words for another, the most similar ones first, with their similarity if it is known."""
        plain = word if word in self._listed or word in self.rows else word.lower()
        if plain not in self._found:
            self._found[plain] = [] if plain.lower() in self._kept else self._search(plain)
        return [(in_case_of(word, other), similarity) for other, similarity in self._found[plain]]

    def similarity(self, word: str, other: str) -> float | None:
        """Return the cosine similarity of two words; None if it is not known."""
        if self._listed:
            return None
        one, two = self._vector(word), self._vector(other)
        return None if one is None or two is None else float(one @ two)

    def _search(self, word: str) -> list[tuple[str, float | None]]:
        options = self._texts.options
        if self._listed:
            listed = [other for other in self._listed.get(word, ()) if other.lower() not in self._kept]
            return [(other, None) for other in listed[: options.candidates]]
        vector = self._vector(word)
        if vector is None:
            return []
        near = torch.where(self._allowed, self._unit @ vector, -torch.inf)
        if word in self.rows:
            near[self.rows[word]] = -torch.inf
        best = near.topk(min(options.candidates, len(near)))
        found = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [(self._names[row], value) for value, row in found if value >= options.similarity]

    def _vector(self, word: str) -> Tensor | None:
        """Return the unit vector of a word; of one in pieces, that of their mean."""
        row = self.rows.get(word, self.rows.get(word.lower()))
        if row is not None:
            return self._unit[row]
        if self._texts.options.synonyms is not None or not self._has_pieces:
            return None
        assert self._texts.table is not None
        pieces = self._texts.vocabulary.pieces(word)
        return F.normalize(self._texts.table[pieces].float().mean(0), dim=-1) if pieces else None

    @cached_property
    def _has_pieces(self) -> bool:
        try:
            return self._texts.vocabulary is not None
        except DataError:
            return False


class MaskedWords:
    """Words that a masked language model of transformers puts in the place of one.

    Args:
        texts: options and labels.

    Raises:
        ConfigError: no model is named.
        VillaError: it cannot be loaded.
    """

    def __init__(self, texts: Texts) -> None:
        from transformers import AutoModelForMaskedLM

        from villa.checkpoints.transformers_folder import load_pretrained, stored_config
        from villa.datasets.own.processors import load_processor

        source = texts.options.masked_lm
        if source is None:
            raise ConfigError(
                "this attack takes its words from a masked language model; set robustness.text.masked_lm to the folder "
                "of one, as transformers saves it"
            )
        processor = load_processor(source)
        self._tokenizer: Any = getattr(processor, "tokenizer", processor)
        if self._tokenizer.mask_token is None:
            raise ConfigError(f"robustness.text.masked_lm='{source}' has no mask token; give a masked language model")
        self._model, report = load_pretrained(AutoModelForMaskedLM, source, stored_config(source))
        if report.missing:
            raise ConfigError(
                f"robustness.text.masked_lm='{source}' is no masked language model: it has no weights for "
                f"{report.missing[0]}; give one with its head"
            )
        self._model.eval()
        names = self._tokenizer.convert_ids_to_tokens(list(range(len(self._tokenizer))))
        self._words = {number: word for word, number in whole_words(names).items()}
        self._kept = labels_of(texts) if texts.options.keep_labels else frozenset()
        self._count = texts.options.candidates

    @torch.inference_mode()
    def of(self, wording: Wording) -> list[list[str]]:
        """Return the likeliest words for each word of a text."""
        if not wording.words:
            return []
        mask = self._tokenizer.mask_token
        rows = [wording.text({place: mask}) for place in range(len(wording.words))]
        limit = min(self._tokenizer.model_max_length, getattr(self._model.config, "max_position_embeddings", 512) - 2)
        given = self._tokenizer(rows, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        logits = self._model(**given).logits
        found = []
        for word, row, ids in zip(wording.words, logits, given["input_ids"], strict=True):
            masked = (ids == self._tokenizer.mask_token_id).nonzero().flatten().tolist()
            found.append(self._likeliest(word, row[masked[0]]) if masked and word.lower() not in self._kept else [])
        return found

    def _likeliest(self, word: str, logits: Tensor) -> list[str]:
        ranked = logits.topk(min(4 * self._count, len(logits))).indices.tolist()
        words = (self._words[number] for number in ranked if number in self._words)
        others = [other for other in words if other.lower() != word.lower() and other.lower() not in self._kept]
        return [in_case_of(word, other) for other in others[: self._count]]


def misspellings(word: str) -> dict[str, list[str]]:
    """Return what becomes of a word by one slip of the fingers, by kind; nothing for words of one or two letters.

    Letters are swapped with the next one, left out, replaced by that of a key beside, or joined by it. The first
    letter stays, as in TextBugger (Li et al., NDSS 2019).
    """
    if len(word) < _LONG_ENOUGH:
        return {}
    inner = range(1, len(word))
    made = {
        "swap": [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in inner if i + 1 < len(word)],
        "delete": [word[:i] + word[i + 1 :] for i in inner],
        "replace": [word[:i] + key + word[i + 1 :] for i in inner for key in _beside(word[i])],
        "insert": [word[: i + 1] + key + word[i + 1 :] for i in inner for key in _beside(word[i])],
    }
    return {kind: others for kind, its in made.items() if (others := [o for o in dict.fromkeys(its) if o != word])}


def _beside(letter: str) -> list[str]:
    for number, row in enumerate(_KEYS):
        place = row.find(letter.lower())
        if letter and place >= 0:
            around = [(number, place - 1), (number, place + 1), (number - 1, place), (number + 1, place)]
            keys = [_KEYS[r][p] for r, p in around if 0 <= r < len(_KEYS) and 0 <= p < len(_KEYS[r])]
            return [key.upper() if letter.isupper() else key for key in keys]
    return []


def in_case_of(word: str, other: str) -> str:
    """Return another word with a capital where the word has one."""
    if word.isupper() and len(word) > 1:
        return other.upper()
    return other[:1].upper() + other[1:] if word[:1].isupper() else other


def labels_of(texts: Texts) -> frozenset[str]:
    """Return the labels that are one word, in lower case."""
    return frozenset(label.lower() for label in texts.facts.labels or ())


def _own_table(texts: Texts) -> tuple[dict[str, int], Tensor]:
    if texts.facts.tokens is None:
        raise DataError(
            "neighbours of words need the names of the rows of the embedding table, but the data have no vocabulary; "
            "set robustness.text.synonyms to a file"
        )
    if texts.table is None:
        raise ConfigError(
            "the words of this model are not looked up in a table where they are perturbed, so that they have no "
            "neighbours; set robustness.text.synonyms to a file"
        )
    rows = {word: row for word, row in whole_words(texts.facts.tokens).items() if row < len(texts.table)}
    return rows, texts.table


def _read_lists(path: Path) -> dict[str, list[str]]:
    value = read_json(path, "list of synonyms", "give robustness.text.synonyms a JSON object {word: [words]}")
    listed = isinstance(value, dict) and all(
        isinstance(others, list) and all(isinstance(other, str) and other.strip() for other in others)
        for others in value.values()
    )
    if not listed or not value:
        raise DataError(f"'{path}' holds no synonyms; give a JSON object {{word: [words]}}")
    return {word: [other for other in others if other != word] for word, others in value.items()}


def _read_vectors(path: Path) -> tuple[dict[str, int], Tensor]:
    """Read vectors as GloVe's and word2vec's text files have them: a word and its numbers a line, spaces between."""
    rows: dict[str, int] = {}
    vectors: list[list[float]] = []
    for number, line in enumerate(lines_of(read_text(path, "file of word vectors", "give a text file")), start=1):
        word, *values = line.rstrip().split(" ")
        if not line.strip() or (number == 1 and len(values) == 1):  # word2vec's first line has the sizes
            continue
        vector = _numbers(values)
        if not vector or (vectors and len(vector) != len(vectors[0])):
            raise DataError(f"{path}:{number}: no word vector; give a word and its numbers, as many each")
        if word not in rows:
            rows[word] = len(vectors)
            vectors.append(vector)
    if not vectors:
        raise DataError(f"'{path}' holds no word vectors; give a word and its numbers a line, or {{word: [words]}}")
    return rows, torch.tensor(vectors)


def _numbers(values: Iterable[str]) -> list[float] | None:
    try:
        found = [float(value) for value in values]
    except ValueError:
        return None
    return found if torch.tensor(found).isfinite().all() else None
