"""Tokenise raw examples into a text database."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from villa.convert.example import RawExample, Words, read_object
from villa.datasets.text import TOKENIZER_FILE, load_tokenizer, vocabulary_size
from villa.datasets.uniter.writers import JOURNAL, TextDatabaseWriter
from villa.errors import DataError, one_line
from villa.files import atomic_write, from_home
from villa.progress import Mode, track
from villa.vetting import OF_PROCESSORS, vetted_source

_SPECIAL = {"UNK": "[UNK]", "CLS": "[CLS]", "SEP": "[SEP]", "MASK": "[MASK]"}
#: Names of known vocabularies by their size and the ids of [CLS] and "!".
_KNOWN = {(28996, 101, 106): "bert-base-cased", (30522, 101, 999): "bert-base-uncased"}
_CACHED_WORDS = 1 << 17


class RawWordPieces:
    """A WordPiece tokenizer with the special tokens of BERT.

    Args:
        source: a ``vocab.txt``, a ``tokenizer.json`` or a folder with one of them (see ``load_tokenizer``), or a name
            on the hub.
        name: name in databases, by which they are compared; by default the vocabulary's known name or the source's.

    Attributes:
        name: see above.
        size: size of the vocabulary.

    Raises:
        DataError: there is no such tokenizer, or it has no [UNK], [CLS], [SEP] or [MASK].
    """

    def __init__(self, source: str, name: str | None = None) -> None:
        self._tokenizer = _load(source)
        self.size = vocabulary_size(self._tokenizer)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        missing = [token for token in _SPECIAL.values() if token not in vocabulary]
        if missing:
            raise DataError(f"tokenizer '{source}' has no {', '.join(missing)}; give that of a BERT model")
        self._special = {key: vocabulary[token] for key, token in _SPECIAL.items()}
        self._first = vocabulary.get("!", max(self._special.values()) + 1)
        known = _KNOWN.get((self.size, self._special["CLS"], self._first))
        self.name = name or known or _plain_name(source)
        self._word = lru_cache(_CACHED_WORDS)(self._encode_word)

    def encode(self, words: Words) -> list[int]:
        """Return the token ids of a text; words without tokens are dropped."""
        return [number for part in words for number in self._part(part)]

    def save(self, folder: Path) -> None:
        """Write the tokenizer into a database's folder, so that its ids keep their meaning."""
        atomic_write(folder / TOKENIZER_FILE, self._tokenizer.to_str())

    def meta(self) -> dict[str, Any]:
        """Return the tokenizer's entries of ``meta.json``.

        ``v_range`` is the range of ids that random tokens are drawn from in masking: from "!" on, as in the released
        databases, or without it from the first id after the special tokens, to the end of the vocabulary (exclusive).
        """
        names = dict.fromkeys(("tokenizer", "toker", "bert"), self.name)
        return {**self._special, "v_range": [self._first, self.size], **names}

    def _part(self, part: str | int) -> Iterator[int]:
        if isinstance(part, int):
            yield self.size + part
            return
        for word in part.split():
            yield from self._word(word)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(word, add_special_tokens=False).ids)


def _load(source: str) -> Tokenizer:
    path = from_home(source)
    if not path.exists() and not _looks_like_path(source):
        return _from_transformers(source)
    tokenizer = load_tokenizer(path)
    tokenizer.no_truncation()
    return tokenizer


def _from_transformers(name: str) -> Tokenizer:
    """Load a tokenizer from the hub's cache, or download it."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    reason = ""
    for local in (True, False):
        try:
            place = vetted_source(name, OF_PROCESSORS, local=local)
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers and the hub raise many kinds
            reason = one_line(error)
            continue
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if isinstance(backend, Tokenizer):
            backend.no_truncation()
            backend.no_padding()
            return backend
        reason = f"{type(tokenizer).__name__} is not backed by the tokenizers package"
    raise DataError(
        f"tokenizer '{name}' is neither a file nor to be had by its name ({reason:.120}); give its vocabulary file: "
        "--tokenizer vocab.txt"
    )


def _looks_like_path(source: str) -> bool:
    return source.endswith((".txt", ".json")) or source.startswith((".", "/", "~")) or source.count("/") > 1


def _plain_name(source: str) -> str:
    path = Path(source)
    return path.stem if path.suffix in (".txt", ".json") else path.name


#: Token ids of an example by field.
Ids = Mapping[str, Any]


@dataclass(frozen=True)
class TextSource:
    """The content of a text database.

    Attributes:
        examples: the examples in the order of the data set, read once.
        total: number of examples for the display, if known.
        lengths: returns an example's entry of ``id2len.json`` (or entries of ``id2len_<kind>.json``) for its ids.
        files: contents of JSON files beside the database, by name without suffix.
        texts_of_images: also write ``img2txts.json``.
        drop_empty: leave out examples with a text without tokens.
    """

    examples: Iterable[RawExample]
    total: int | None = None
    lengths: Callable[[Ids], int | dict[str, int]] = lambda ids: len(ids["input_ids"])
    files: Mapping[str, Any] = field(default_factory=dict)
    texts_of_images: bool = False
    drop_empty: bool = False


@dataclass(frozen=True)
class Outcome:
    """The result of a conversion.

    Attributes:
        entries: examples or images in the database.
        present: how many of them were there before.
        left_out: number of examples left out.
    """

    entries: int
    present: int
    left_out: int = 0


def finished_text_database(path: Path, meta: Mapping[str, Any]) -> bool:
    """Return whether there is a finished database with this ``meta.json``.

    Raises:
        DataError: there is one with another ``meta.json``.
    """
    if (path / JOURNAL).exists() or not (path / "meta.json").exists():
        return False
    present = read_object(path / "meta.json").values
    other = [key for key in (*meta, *present) if meta.get(key) != present.get(key)]
    if other:
        given, there = (json.dumps(values.get(other[0]))[:120] for values in (meta, present))
        raise DataError(
            f"'{path}' holds a finished database made with another {other[0]} ({there}, now {given}); give another "
            "--output, or remove it"
        )
    return True


def write_text_database(
    path: Path,
    source: TextSource,
    pieces: RawWordPieces,
    meta: Mapping[str, Any],
    *,
    missing: frozenset[str] = frozenset(),
    progress: Mode = "auto",
) -> Outcome:
    """Tokenise examples into a text database, or continue an unfinished one.

    Args:
        path: folder of the database.
        source: its content.
        pieces: the tokenizer.
        meta: contents of ``meta.json``.
        missing: names of missing feature files, whose examples are left out.
        progress: how to show progress.

    Raises:
        DataError: an example cannot be used, two have the same id, or the database was begun with another ``meta``.
    """
    seen: set[str] = set()
    with TextDatabaseWriter(path, meta, texts_of_images=source.texts_of_images) as writer:
        present = len(writer)
        for example in track(source.examples, f"write {path.name}", source.total, mode=progress):
            if example.id in seen:
                raise DataError(f"{example.where}: the id '{example.id}' occurs twice; ids must be unique")
            seen.add(example.id)
            if not writer.has(example.id) and missing.isdisjoint(_images(example)):
                _add(writer, example, source, pieces)
        if not len(writer):
            raise DataError(f"no example is left for '{path}'; check the files given")
        pieces.save(path)
        for name, value in source.files.items():
            atomic_write(path / f"{name}.json", json.dumps(value, ensure_ascii=False))
        return Outcome(len(writer), present, left_out=len(seen) - len(writer))


def _add(writer: TextDatabaseWriter, example: RawExample, source: TextSource, pieces: RawWordPieces) -> None:
    ids = {name: _encode(text, pieces) for name, text in example.texts.items()}
    if source.drop_empty and not all(ids.values()):
        return
    images = {} if example.images is None else {"img_fname": example.images}
    try:
        fields = {**example.fields, **example.membership(), **images, **ids}
        writer.add(example.id, fields, source.lengths(ids), example.images)
    except (OverflowError, ValueError, TypeError, UnicodeEncodeError) as error:
        raise DataError(f"{example.where}: cannot be stored ({error}); mend its numbers and texts") from error


def _encode(text: Words | list[Words], pieces: RawWordPieces) -> list[Any]:
    if isinstance(text, tuple):
        return pieces.encode(text)
    return [pieces.encode(words) for words in text]


def _images(example: RawExample) -> list[str]:
    images = example.images or []
    return [images] if isinstance(images, str) else images
