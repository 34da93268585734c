"""Word-piece tokenisation on the ``tokenizers`` package."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

# Data loading forks: a tokenizer whose thread pool was running before a fork can hang in the child.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from tokenizers import Encoding, Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.normalizers import Normalizer
from torch import Tensor

from villa.datasets.ragged import Integers
from villa.errors import DataError, one_line, reading
from villa.files import lines_of, read_json, read_text

#: Special tokens of tokenizers that villa builds, in the order of their ids ([PAD] is 0).
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOKENIZER_FILE = "tokenizer.json"
#: Maximum number of unused ids in a vocabulary.
_GAPS = 100_000
#: Size of the cache of texts; many data sets have few distinct questions.
KEPT_TEXTS = 4096
#: Size of the cache of parts of texts, and number of texts that are split together.
KEPT_PARTS, TOGETHER = 1 << 16, 1 << 13
#: Number of tokens of a part that cannot be read alone.
_UNREADABLE = -(1 << 40)
#: One or two texts that are read together.
Texts: TypeAlias = tuple[str, str | None]
#: Smallest length that holds [CLS], one word-piece and [SEP].
SHORTEST = 3


def build_tokenizer(texts: Iterable[str], max_size: int) -> Tokenizer:
    """Build a lower-casing WordPiece tokenizer from texts; the same texts give the same ids.

    The vocabulary holds the special tokens, every character (alone and as a continuation, so that few words are
    unknown), then whole words by frequency. The package's own WordPiece trainer is not used because its ids depend on
    the iteration order of a hash table, and all processes must agree on them.

    Args:
        texts: training texts; read once.
        max_size: maximum vocabulary size; the rarest words are dropped first, then the rarest characters.

    Raises:
        DataError: ``max_size`` is too small, or there is no text.
    """
    if max_size <= len(SPECIAL_TOKENS):
        raise DataError(f"a vocabulary of {max_size} is too small; it needs more than {len(SPECIAL_TOKENS)} entries")
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for part, times in _parts(texts):
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(part)):
            words[word] += times
    if not words:
        raise DataError("there is no text to build a vocabulary from; check the questions of the training split")
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
            characters["##" + character] += count * (len(word) > 1)
    ranked = [*_ranked(+characters), *(word for word in _ranked(words) if word not in characters)]
    entries = [*SPECIAL_TOKENS, *ranked][:max_size]
    return _bert_tokenizer({entry: index for index, entry in enumerate(entries)}, normalizer)


def tokenizer_of(tokens: Sequence[str | None]) -> Tokenizer:
    """Return BERT's tokenizer for named word-pieces; None stands for an unused id.

    Raises:
        DataError: they are not the names of word-pieces.
    """
    vocabulary = {token: index for index, token in enumerate(tokens) if token is not None}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in vocabulary]
    if missing:
        raise DataError(f"the tokens of the data are not those of BERT's tokenizers: there is no {', '.join(missing)}")
    return _bert_tokenizer(vocabulary, normalizers.BertNormalizer(lowercase=not _is_cased(vocabulary)))


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer from a ``tokenizer.json``, a BERT ``vocab.txt``, or a folder that holds one of them.

    A ``tokenizer_config.json`` beside a ``vocab.txt`` sets how texts are normalised; if it does not mention case, texts
    are lower-cased unless an entry other than a special token has an upper-case letter.

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
            vocabulary = _read_vocabulary(path)
            return _bert_tokenizer(vocabulary, _normalizer(path.parent, vocabulary))
        tokenizer = Tokenizer.from_str(read_text(path, "tokenizer"))
        tokenizer.no_padding()
        _check_ids(tokenizer)
    return tokenizer


def _check_ids(tokenizer: Tokenizer) -> None:
    """Refuse ids that the library accepts, but that are far beyond the entries or outside the vocabulary."""
    entries, size = tokenizer.get_vocab_size(with_added_tokens=True), vocabulary_size(tokenizer)
    if size > 16 * entries + _GAPS:
        raise ValueError(f"its {entries} entries have ids up to {size - 1}")
    for texts in (("",), ("", "")):  # special tokens may have ids beyond the vocabulary
        try:
            ids = tokenizer.encode(*texts).ids
        except Exception:  # noqa: S112 - it may read only words, or only single texts
            continue
        if ids and max(ids) >= size:
            raise ValueError(f"it puts the id {max(ids)} around texts, where the vocabulary has {size}")


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` into ``folder``."""
    tokenizer.save(str(folder / TOKENIZER_FILE))


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return the number of embedding rows that the tokenizer's ids need (the largest id plus one)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _encode(
    tokenizer: Tokenizer, text: str, pair: str | None, max_length: int | None, *, around: bool = True
) -> Encoding:
    """Encode one or two texts, with special tokens if ``around``; see ``encode_texts``."""
    truncation = tokenizer.truncation
    if max_length is None and truncation is not None:
        tokenizer.no_truncation()
    elif max_length is not None and (truncation is None or truncation["max_length"] != max_length):
        tokenizer.enable_truncation(max_length)
    try:
        found = tokenizer.encode(text, pair, add_special_tokens=around)
    except Exception as error:  # the package raises bare exceptions
        raise DataError(f"the tokenizer cannot read the text {text!r:.60}: {one_line(error)}; mend it") from error
    if around and not found.ids:
        raise nothing_left(text)
    return found


def encode_texts(
    tokenizer: Tokenizer, text: str, pair: str | None, max_length: int | None
) -> tuple[Tensor, Tensor | None]:
    """Return the token ids ``[T]`` of one or two texts, and for two their types ``[T]`` (0 and 1), else None.

    Args:
        tokenizer: the tokenizer.
        text: the text.
        pair: a second text, or None.
        max_length: length to truncate to; None for no truncation.

    Raises:
        DataError: the tokenizer cannot read a text, or returns no token.
    """
    found = _encode(tokenizer, text, pair, max_length)
    types = None if pair is None else torch.tensor(found.type_ids, dtype=torch.int64)
    return torch.tensor(found.ids, dtype=torch.int64), types


def characters_of(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> list[tuple[int, int] | None]:
    """Return the characters of a text that each of an example's tokens stands for; None for those of no character.

    Args:
        tokenizer: the tokenizer.
        text: the text, all or the beginning of which is somewhere among the tokens.
        ids: the tokens, with special ones, a prompt, or anything else around those of the text.

    Raises:
        DataError: the tokens are not those of the text.
    """
    found: list[tuple[int, int] | None] = [None] * len(ids)
    for before in ("", " ", "\n"):  # what stands before a text may change its first token
        encoded = _encode(tokenizer, before + text, None, None, around=False)
        pieces = [
            (id_, place) for id_, place in zip(encoded.ids, encoded.offsets, strict=True) if place[1] > len(before)
        ]
        start, length = _longest(ids, [id_ for id_, _ in pieces])
        if length:
            for place, (_, (first, end)) in enumerate(pieces[:length], start):
                found[place] = (max(first - len(before), 0), end - len(before))
            return found
    raise DataError(f"the tokens of the text {text!r:.60} are not found among those that the model reads; mend it")


def _longest(ids: Sequence[int], wanted: Sequence[int]) -> tuple[int, int]:
    """Return place and length of the tokens within others; of their beginning, if the others were cut there."""
    width = len(wanted)
    for start in range(len(ids) - width, -1, -1) if width else ():
        if list(ids[start : start + width]) == list(wanted):
            return start, width
    for start in range(len(ids)) if width else ():  # cut off, with a special token behind
        length = len(ids) - 1 - start
        if 0 < length < width and list(ids[start:-1]) == list(wanted[:length]):
            return start, length
    return 0, 0


class TokenCounter:
    """Counts the tokens of texts, much faster than by encoding them if words are tokenized one by one.

    Args:
        tokenizer: the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._around = _tokens_around(tokenizer)
        self._forget()

    def _forget(self) -> None:
        self._parts, self._counts = pa.array([], pa.string()), np.zeros(0, np.int64)  # between spaces
        self._texts: dict[tuple[str, str | None], int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "_around": self._around}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._forget()

    def __call__(self, texts: Sequence[Texts]) -> Integers:
        """Return the number of tokens ``[N]`` of every text or two texts, special tokens included.

        Raises:
            DataError: as for ``encode_texts``.
        """
        counts: Integers = np.zeros(len(texts), np.int64)
        if self._around is not None:
            paired = np.array([pair is not None for _, pair in texts], np.bool_)
            counts = self._inside([text for text, _ in texts])
            if paired.any():
                counts += self._inside([pair or "" for _, pair in texts])
            counts[counts > 0] += np.array(self._around)[paired[counts > 0].astype(np.int64)]
        for row in np.flatnonzero(counts <= 0).tolist():
            counts[row] = self._whole(texts[row])
        return counts

    def _inside(self, texts: Sequence[str]) -> Integers:
        """Return the numbers of tokens ``[N]`` without special ones; below 1 if a text must be read as a whole."""
        try:
            split = _split(texts)
        except UnicodeEncodeError:  # half a character, in one of them
            return np.full(len(texts), _UNREADABLE)
        places = pc.index_in(split.values, value_set=self._parts)
        if places.null_count:
            new = split.values.filter(places.is_null()).unique()
            parts = pa.concat_arrays([self._parts, new])
            counts = np.append(self._counts, np.fromiter(map(self._part, new.to_pylist()), np.int64))
            places = pc.index_in(split.values, value_set=parts)
            self._parts, self._counts = parts[:KEPT_PARTS], counts[:KEPT_PARTS]
        else:
            counts = self._counts
        return np.add.reduceat(counts[places.to_numpy()], split.offsets.to_numpy()[:-1])

    def _part(self, part: str) -> int:
        try:
            return len(_encode(self.tokenizer, part, None, None, around=False).ids)
        except DataError:  # its message names only a part of the text
            return _UNREADABLE

    def _whole(self, texts: Texts) -> int:
        count = self._texts.get(texts)
        if count is None:
            count = len(_encode(self.tokenizer, *texts, None).ids)
            if len(self._texts) < KEPT_TEXTS:
                self._texts[texts] = count
        return count


def _tokens_around(tokenizer: Tokenizer) -> tuple[int, int] | None:
    """Return the number of special tokens added to one text and to two.

    None if the tokens of a text are not those of its space-separated parts, one after another, or if that is not
    known: only the components of BERT's tokenizers are recognised.
    """
    parts = (
        (tokenizer.normalizer or normalizers.Lowercase(), (normalizers.BertNormalizer, normalizers.Lowercase)),
        (tokenizer.pre_tokenizer, (pre_tokenizers.BertPreTokenizer, pre_tokenizers.Whitespace)),
        (tokenizer.post_processor, (processors.BertProcessing, processors.TemplateProcessing)),
    )
    added = tokenizer.get_added_tokens_decoder().values()
    known = all(isinstance(part, kinds) for part, kinds in parts) and tokenizer.padding is None
    if not known or any(" " in token.content for token in added):
        return None

    def made(text: str, pair: str | None = None, *, around: bool = True) -> int:
        return len(_encode(tokenizer, text, pair, None, around=around).ids)

    try:
        one, three = made("a", around=False), made("a a a", around=False)
        single, double = made("a") - one, made("a", "a") - 2 * one
        whole = made("a a a") == single + three and made("a", "a a a") == made("a a a", "a") == double + one + three
    except DataError:
        return None
    return (single, double) if whole and three > one else None


def nothing_left(text: str) -> DataError:
    """Return the error for a text of which a tokenizer without special tokens leaves nothing."""
    return DataError(f"the tokenizer makes nothing of the text {text!r:.60}; mend it, or leave it out")


class CutTexts:
    """Counts texts, and those that are truncated."""

    def __init__(self) -> None:
        self._texts = self._cut = self._read = self._longest = 0

    def add(self, lengths: Integers) -> None:
        """Count texts by their numbers of tokens ``[N, 2]`` after and before truncation."""
        self._texts += len(lengths)
        cut = lengths[lengths[:, 0] < lengths[:, 1]]
        if len(cut):
            self._cut += len(cut)
            self._read, self._longest = int(cut[-1, 0]), max(self._longest, int(cut[:, 1].max()))

    def warnings(self) -> list[str]:
        """Return a line about truncated texts, if there are any."""
        if not self._cut:
            return []
        return [
            f"{self._cut:,} of {self._texts:,} texts are longer than {self._read} tokens and are cut; the longest has "
            f"{self._longest:,} (dataset.max_text_length)"
        ]


def _split(texts: Iterable[str]) -> pa.ListArray:
    """Split texts at spaces: one part or more of each."""
    return pc.split_pattern(pa.array(texts, pa.string()), " ")


def _parts(texts: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yield the space-separated parts of texts with their counts; few parts are yielded twice."""
    schema = pa.schema([("values", pa.string()), ("counts", pa.int64())])
    counted = schema.empty_table()
    source = iter(texts)
    while some := list(islice(source, TOGETHER)):
        found = pa.Table.from_struct_array(pc.value_counts(_split(some).values))
        counted = pa.concat_tables([counted, found])
        if len(counted) > 4 * KEPT_PARTS:
            counted = _added_up(counted)
            if len(counted) > KEPT_PARTS:
                yield from _rows(counted)
                counted = schema.empty_table()
    yield from _rows(_added_up(counted))


def _added_up(counted: pa.Table) -> pa.Table:
    sums = counted.group_by("values", use_threads=False).aggregate([("counts", "sum")])
    return sums.rename_columns({"counts_sum": "counts"}).select(["values", "counts"])


def _rows(counted: pa.Table) -> Iterator[tuple[str, int]]:
    return zip(counted["values"].to_pylist(), counted["counts"].to_pylist(), strict=True)


def _ranked(counts: Counter[str]) -> list[str]:
    return sorted(counts, key=lambda entry: (-counts[entry], entry))


def _bert_tokenizer(vocabulary: dict[str, int], normalizer: Normalizer) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    tokenizer.add_special_tokens([token for token in SPECIAL_TOKENS if token in vocabulary])
    return tokenizer


def _read_vocabulary(path: Path) -> dict[str, int]:
    vocabulary = {entry: index for index, entry in enumerate(lines_of(read_text(path, "vocabulary")))}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in vocabulary]
    if missing:
        raise DataError(f"'{path}' is not a BERT vocabulary: it has no {', '.join(missing)}")
    return vocabulary


def _normalizer(folder: Path, vocabulary: Iterable[str]) -> Normalizer:
    """Return the normalizer for a ``vocab.txt``, from the ``tokenizer_config.json`` beside it."""
    path = folder / "tokenizer_config.json"
    config = read_json(path, "tokenizer's configuration") if path.is_file() else {}
    if not isinstance(config, dict):
        raise DataError(f"'{path}' must hold a JSON object, as transformers writes it; mend it, or remove it")
    names = {"do_lower_case": "lowercase", "strip_accents": "strip_accents"}
    names |= {"tokenize_chinese_chars": "handle_chinese_chars"}
    given = {ours: bool(config[theirs]) for theirs, ours in names.items() if config.get(theirs) is not None}
    wrong = next((name for name in names if config.get(name) not in (None, True, False)), None)
    if wrong is not None:
        raise DataError(f"'{path}' says {wrong}={config[wrong]!r:.20}; it must be true or false")
    return normalizers.BertNormalizer(**{"lowercase": not _is_cased(vocabulary), **given})


def _is_cased(vocabulary: Iterable[str]) -> bool:
    """Return whether a vocabulary is cased, ignoring special tokens like [PAD].

    Single non-ASCII letters are ignored, too: some in lower-cased vocabularies have since been given a lower case in
    Unicode.
    """
    ordinary = (entry for entry in vocabulary if not (len(entry) > 2 and entry[0] in "[<" and entry[-1] in "]>"))
    words = (entry.removeprefix("##") for entry in ordinary)
    return any(word != word.lower() and (len(word) > 1 or word.isascii()) for word in words)
