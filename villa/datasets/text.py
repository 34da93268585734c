"""Word-piece tokenisation on the ``tokenizers`` package."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

# Data loading forks: a tokenizer whose thread pool was running before a fork can hang in the child.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from villa.errors import DataError, reading
from villa.plugins import one_line

#: Special tokens of a tokenizer built here, in the order of their ids ([PAD] is 0).
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOKENIZER_FILE = "tokenizer.json"
#: Ids that a vocabulary may leave out.
_GAPS = 100_000
#: Smallest length that holds [CLS], one word-piece and [SEP].
SHORTEST = 3


def build_tokenizer(texts: Iterable[str], max_size: int) -> Tokenizer:
    """Build a lower-casing WordPiece tokenizer from texts; the same texts give the same ids.

    The vocabulary holds the special tokens, every character (alone and as a continuation, so that few words are
    unknown), then whole words by frequency. The package's own WordPiece trainer is not used because its ids
    depend on the iteration order of a hash table, and all processes must agree on them.

    Args:
        texts: training texts; read once.
        max_size: largest number of entries; the rarest words are left out first, then the rarest characters.

    Raises:
        DataError: ``max_size`` leaves no room, or there is no text.
    """
    if max_size <= len(SPECIAL_TOKENS):
        raise DataError(f"a vocabulary of {max_size} is too small; it needs more than {len(SPECIAL_TOKENS)} entries")
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    if not words:
        raise DataError("there is no text to build a vocabulary from; check the questions of the training split")
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
            characters["##" + character] += count * (len(word) > 1)
    ranked = [*_ranked(+characters), *(word for word in _ranked(words) if word not in characters)]
    entries = [*SPECIAL_TOKENS, *ranked][:max_size]
    return _bert_tokenizer({entry: index for index, entry in enumerate(entries)}, lowercase=True)


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer from a ``tokenizer.json``, a BERT ``vocab.txt``, or a folder that holds one of them.

    A folder's ``tokenizer_config.json`` says whether a ``vocab.txt`` is lower-cased (the default).

    Raises:
        DataError: there is no such file, or it is not a tokenizer.
    """
    if path.is_dir():
        files = [path / name for name in (TOKENIZER_FILE, "vocab.txt") if (path / name).is_file()]
        if not files:
            raise DataError(f"tokenizer '{path}' holds neither {TOKENIZER_FILE} nor vocab.txt; give one of them")
        path = files[0]
    if not path.is_file():
        raise DataError(f"tokenizer '{path}' does not exist; give a {TOKENIZER_FILE}, a vocab.txt or a folder")
    with reading(f"'{path}' is not a tokenizer", "give another copy"):
        if path.suffix == ".txt":
            return _bert_tokenizer(_read_vocabulary(path), lowercase=_is_lowercase(path.parent))
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        _check_ids(tokenizer)
    return tokenizer


def _check_ids(tokenizer: Tokenizer) -> None:
    """Refuse ids that no embedding has rows for: the library takes them as they are written."""
    entries, size = tokenizer.get_vocab_size(with_added_tokens=True), vocabulary_size(tokenizer)
    if size > 16 * entries + _GAPS:
        raise ValueError(f"its {entries} entries have ids up to {size - 1}")
    for texts in (("",), ("", "")):  # what is put around texts has ids of its own
        try:
            ids = tokenizer.encode(*texts).ids
        except Exception:  # noqa: S112 - it may read words, or single texts, alone
            continue
        if ids and max(ids) >= size:
            raise ValueError(f"it puts the id {max(ids)} around texts, where the vocabulary has {size}")


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` into ``folder``."""
    tokenizer.save(str(folder / TOKENIZER_FILE))


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Rows that an embedding of this tokenizer's ids needs (the largest id plus one)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def encode(tokenizer: Tokenizer, text: str, max_length: int) -> Tensor:
    """Return the word-piece ids of a text with [CLS] and [SEP]: ``[T]`` int64, T <= ``max_length``."""
    return encode_texts(tokenizer, text, None, max_length)[0]


def encode_texts(tokenizer: Tokenizer, text: str, pair: str | None, max_length: int) -> tuple[Tensor, Tensor | None]:
    """Return the word-piece ids ``[T]`` of a text or of two, and with two their types ``[T]`` (0 and 1), else None.

    Raises:
        DataError: the tokenizer cannot read a text, or makes nothing of it.
    """
    truncation = tokenizer.truncation
    if truncation is None or truncation["max_length"] != max_length:
        tokenizer.enable_truncation(max_length)
    try:
        found = tokenizer.encode(text, pair)
    except Exception as error:  # the package raises bare exceptions
        raise DataError(f"the tokenizer cannot read the text {text!r:.60}: {one_line(error)}; mend it") from error
    if not found.ids:
        raise DataError(f"the tokenizer makes nothing of the text {text!r:.60}; mend it, or leave it out")
    types = None if pair is None else torch.tensor(found.type_ids, dtype=torch.int64)
    return torch.tensor(found.ids, dtype=torch.int64), types


def _ranked(counts: Counter[str]) -> list[str]:
    return sorted(counts, key=lambda entry: (-counts[entry], entry))


def _bert_tokenizer(vocabulary: dict[str, int], *, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    tokenizer.add_special_tokens([token for token in SPECIAL_TOKENS if token in vocabulary])
    return tokenizer


def _read_vocabulary(path: Path) -> dict[str, int]:
    # Not splitlines(): entries may be characters that it takes for the end of a line.
    entries = [line.removesuffix("\r") for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in vocabulary]
    if missing:
        raise DataError(f"'{path}' is not a BERT vocabulary: it has no {', '.join(missing)}")
    return vocabulary


def _is_lowercase(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    return bool(json.loads(config.read_text()).get("do_lower_case", True)) if config.is_file() else True
