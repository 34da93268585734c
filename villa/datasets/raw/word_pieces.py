"""The tokenisation of the official databases: WordPiece of each word, without [CLS] and [SEP]."""

from __future__ import annotations

import string
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers

from villa.datasets.raw.example import Words
from villa.datasets.text import load_tokenizer, vocabulary_size
from villa.errors import DataError
from villa.plugins import one_line
from villa.vetting import OF_PROCESSORS, vetted_source

_SPECIAL = {"UNK": "[UNK]", "CLS": "[CLS]", "SEP": "[SEP]", "MASK": "[MASK]"}
#: Names of vocabularies by their size and the ids of [CLS] and "!".
_KNOWN = {(28996, 101, 106): "bert-base-cased", (30522, 101, 999): "bert-base-uncased"}
_CACHED_WORDS = 1 << 17


class WordPieces:
    """A WordPiece tokenizer with the special tokens of BERT.

    Args:
        source: a ``vocab.txt``, a ``tokenizer.json``, a folder with one of them, or a name that transformers knows. A
            ``vocab.txt`` without ``tokenizer_config.json`` is taken for lower-cased if it has no upper-case letter.
        name: what databases call it (they are compared by it); by default that of the source.

    Attributes:
        name: see above.
        size: entries of the vocabulary.

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
        """Return the ids of a text: those of each word after one another; a word without a piece is dropped."""
        return [number for part in words for number in self._part(part)]

    def meta(self) -> dict[str, Any]:
        """Return what ``meta.json`` says about the tokenizer.

        ``v_range`` is where random words come from when words are masked: from "!" on, as in the released databases,
        or without it from the first entry after the special ones, up to the end of the vocabulary (exclusive).
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
    path = Path(source).expanduser()
    if not path.exists() and not _looks_like_path(source):
        return _from_transformers(source)
    tokenizer = load_tokenizer(path)
    vocabulary = path / "vocab.txt" if path.is_dir() else path
    is_bare = vocabulary.suffix == ".txt" and not (vocabulary.parent / "tokenizer_config.json").is_file()
    if is_bare and not (path / "tokenizer.json").is_file():
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=_is_lowercase(tokenizer))
    tokenizer.no_truncation()
    return tokenizer


def _from_transformers(name: str) -> Tokenizer:
    """Take a tokenizer from the cache of transformers, or let it be downloaded."""
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


def _is_lowercase(tokenizer: Tokenizer) -> bool:
    entries = (entry for entry in tokenizer.get_vocab() if not entry.startswith("["))
    return not any(letter in string.ascii_uppercase for entry in entries for letter in entry)


def _looks_like_path(source: str) -> bool:
    return source.endswith((".txt", ".json")) or source.startswith((".", "/", "~")) or source.count("/") > 1


def _plain_name(source: str) -> str:
    path = Path(source)
    return path.stem if path.suffix in (".txt", ".json") else path.name
