import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertTokenizer

from villa.convert.text_database import WordPieces
from villa.errors import DataError

TEXTS = st.text(st.sampled_from("Whatishemndog ?!'-.,\tÉé中\u200b\x00ñ"), max_size=40)


def reference(vocabulary: Path, text: str, *, lowercase: bool = False) -> list[int]:
    """The recipe with transformers' tokenizer: split on white space, WordPiece each word, drop empty results."""
    tokenizer = BertTokenizer(str(vocabulary), do_lower_case=lowercase)
    return [number for word in text.split() for number in tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word))]


def by_hand(vocabulary: Path, word: str) -> list[int]:
    """Longest match first over a word of ASCII letters."""
    entries = {entry: number for number, entry in enumerate(vocabulary.read_text().split("\n"))}
    ids: list[int] = []
    start = 0
    while start < len(word):
        prefix = "##" if start else ""
        end = max((e for e in range(start + 1, len(word) + 1) if prefix + word[start:e] in entries), default=None)
        if end is None:
            return [entries["[UNK]"]]
        ids.append(entries[prefix + word[start:end]])
        start = end
    return ids


@given(TEXTS)
def test_ids_are_those_of_transformers(vocabulary: Path, text: str) -> None:
    assert WordPieces(str(vocabulary)).encode((text,)) == reference(vocabulary, text)


def test_ids_are_those_of_longest_match(vocabulary: Path) -> None:
    pieces = WordPieces(str(vocabulary))
    words = ["What", "holding", "dogs", "bottles", "left", "zz", "Whatholding"]
    assert pieces.encode((" ".join(words),)) == [number for word in words for number in by_hand(vocabulary, word)]


def test_a_bare_vocabulary_says_by_its_letters_whether_it_is_cased(tmp_path: Path, vocabulary: Path) -> None:
    entries = [e for e in vocabulary.read_text().split() if e.startswith("[") or e == e.lower()]
    lower = tmp_path / "vocab.txt"
    lower.write_text("\n".join([*entries, "what"]) + "\n")
    assert WordPieces(str(lower)).encode(("WHAT is É",)) == reference(lower, "WHAT is É", lowercase=True)
    assert WordPieces(str(tmp_path)).encode(("WHAT",)) == [len(entries)]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert WordPieces(str(lower)).encode(("WHAT",)) == [entries.index("[UNK]")]


def test_numbers_are_words_after_the_vocabulary_and_empty_words_are_dropped(vocabulary: Path) -> None:
    pieces = WordPieces(str(vocabulary))
    assert pieces.encode((0, "\u200b  \x00", 80)) == [pieces.size, pieces.size + 80]


def test_long_texts_are_not_cut(tmp_path: Path, vocabulary: Path) -> None:
    from villa.datasets.text import load_tokenizer, save_tokenizer

    tokenizer = load_tokenizer(vocabulary)
    tokenizer.enable_truncation(3)
    save_tokenizer(tokenizer, tmp_path)
    assert len(WordPieces(str(tmp_path)).encode(("is the " * 50, "is?" * 20))) == 100 + 40


def test_meta_holds_what_the_released_readers_want(vocabulary: Path, tmp_path: Path) -> None:
    meta = WordPieces(str(vocabulary)).meta()
    size = len(vocabulary.read_text().split())
    assert meta == {
        "UNK": 2, "CLS": 3, "SEP": 4, "MASK": 5, "v_range": [6, size],
        "tokenizer": "vocab", "toker": "vocab", "bert": "vocab",
    }  # fmt: skip
    assert WordPieces(str(vocabulary), "mine").meta()["bert"] == "mine"
    bare = tmp_path / "bare.txt"
    bare.write_text("[PAD]\n[CLS]\n[SEP]\n[UNK]\n[MASK]\ndog\n")
    assert WordPieces(str(bare)).meta()["v_range"] == [5, 6]


def test_the_vocabulary_of_bert_is_known_by_name(tmp_path: Path) -> None:
    entries = [f"[unused{n}]" for n in range(28996)]
    entries[100:104] = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    entries[0], entries[106], entries[107] = "[PAD]", "!", "A"
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(entries))
    pieces = WordPieces(str(path))
    assert (pieces.name, pieces.meta()["v_range"]) == ("bert-base-cased", [106, 28996])


def test_a_tokenizer_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="does not exist"):
        WordPieces(str(tmp_path / "vocab.txt"))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    with pytest.raises(DataError, match=r"has no \[MASK\]"):
        WordPieces(str(tmp_path / "vocab.txt"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"neither a file nor to be had by its name.*--tokenizer vocab\.txt") as caught:
        WordPieces("no-such-tokenizer")
    assert "\n" not in str(caught.value)
    assert unicodedata.normalize("NFC", str(caught.value)).isprintable()
