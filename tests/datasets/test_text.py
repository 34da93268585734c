from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from villa.convert.text_database import RawWordPieces as DatabasePieces
from villa.datasets.own.readers import WordPieces
from villa.datasets.text import (
    TokenCounter,
    build_tokenizer,
    encode_texts,
    load_tokenizer,
    save_tokenizer,
    vocabulary_size,
)
from villa.errors import DataError

TEXTS = ["What color is the shape?", "is there a red shape?", "what is the color?"]


def test_special_tokens_come_first_and_frequent_words_are_whole() -> None:
    tokenizer = build_tokenizer(TEXTS, 200)
    assert [tokenizer.token_to_id(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    assert tokenizer.encode("WHAT is the colour?").tokens[:4] == ["[CLS]", "what", "is", "the"]
    assert "[UNK]" not in tokenizer.encode("hotpads").tokens  # unseen word of seen characters


def test_encode_truncates_with_separator_in_place() -> None:
    tokenizer = build_tokenizer(TEXTS, 200)
    ids = encode_texts(tokenizer, "what color is the red shape?", None, 5)[0]
    assert ids.dtype == torch.int64
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == "[CLS] what color is [SEP]"
    assert len(encode_texts(tokenizer, "what color is the red shape?", None, 60)[0]) == 9


def test_size_limit_is_kept() -> None:
    assert vocabulary_size(build_tokenizer(TEXTS, 30)) == 30


def test_ids_do_not_depend_on_the_process() -> None:
    code = f"from villa.datasets.text import build_tokenizer; print(build_tokenizer({TEXTS!r}, 200).to_str())"
    outputs = set()
    for seed in ("0", "1"):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
        outputs.add(run.stdout)
    assert len(outputs) == 1


def test_save_and_load(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(TEXTS, 200)
    save_tokenizer(tokenizer, tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert encode_texts(load_tokenizer(path), TEXTS[0], None, 60)[0].equal(
            encode_texts(tokenizer, TEXTS[0], None, 60)[0]
        )


@pytest.mark.parametrize("cased", [True, False])
def test_vocabulary_file_agrees_with_transformers(tmp_path: Path, cased: bool) -> None:
    from transformers import BertTokenizer

    entries = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "what",
        "What",
        "is",
        "this",
        "##s",
        "?",
        "un",
        "##able",
        "é",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(entries))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": not cased}))
    reference = BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=not cased)
    for text in ("What is this?", "unable whats éé é xyz", "THIS?!"):
        assert encode_texts(load_tokenizer(tmp_path), text, None, 60)[0].tolist() == reference(text)["input_ids"]


def test_entries_that_look_like_ends_of_lines_keep_the_ids_of_the_others(tmp_path: Path) -> None:
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "\u2028", "\x85", "word"]
    for end in ("\n", "\r\n"):
        (tmp_path / "vocab.txt").write_bytes((end.join(entries) + end).encode())
        assert load_tokenizer(tmp_path / "vocab.txt").token_to_id("word") == 6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("vocab.txt", "a\nb", r"no \[UNK\], \[CLS\], \[SEP\]"),
        ("other.txt", None, "does not exist"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path / name)


def test_empty_folder_and_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither tokenizer.json nor vocab.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="no text"):
        build_tokenizer([], 100)
    with pytest.raises(DataError, match="too small"):
        build_tokenizer(TEXTS, 5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.BPE({"r": 0}, []), r"makes nothing of the text '\\u200b'; mend it"),
        (models.WordLevel({"r": 0}), r"cannot read the text '\\u200b': Exception: WordLevel error: Missing"),
    ],
)
def test_a_text_that_is_nothing_to_a_tokenizer_without_special_tokens_is_refused(
    model: models.Model, message: str
) -> None:
    words = WordPieces(Tokenizer(model), 5)
    assert words("r", None)[0].tolist() == [0]
    with pytest.raises(DataError, match=f"the tokenizer {message}"):
        words("\u200b", None)


CASED = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "!", "?", "What", "what", "is", "the", "in", "Paris"]
CASED += ["W", "##hat", "P", "##aris", "é"]
SENTENCE = "What is in Paris? É"


def pieces(path: Path, text: str = SENTENCE) -> list[str]:
    """The word-pieces of a text, the same for data sets and for the databases' tool."""
    tokenizer = load_tokenizer(path)
    ids = encode_texts(tokenizer, text, None, 60)[0].tolist()[1:-1]
    assert DatabasePieces(str(path)).encode((text,)) == ids
    return [str(tokenizer.id_to_token(number)) for number in ids]


@pytest.mark.parametrize("cased", [True, False])
def test_a_bare_vocabulary_says_by_its_letters_whether_it_is_cased(tmp_path: Path, cased: bool) -> None:
    from transformers import BertTokenizer

    path = tmp_path / "vocab.txt"
    entries = CASED if cased else [entry for entry in CASED if entry.startswith("[") or entry == entry.lower()]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(entries).encode())
    plain = tmp_path / "plain.txt"
    plain.write_text("\n".join(entries))
    theirs = BertTokenizer(str(plain), do_lower_case=not cased)
    assert pieces(path) == pieces(tmp_path) == theirs.tokenize(SENTENCE)
    assert ("Paris" in pieces(path)) is cased


@pytest.mark.parametrize(
    ("entries", "cased"),
    [
        (["[DOC]", "[unused1]", "<S>", "what"], False),
        (["what", "\u13a0", "##\u13a0"], False),  # lower case since Unicode 8: BERT's lists have such letters
        (["what", "W"], True),
        (["what", "##ING"], True),
        (["что", "Москва"], True),
    ],
)
def test_which_entries_are_upper_case(tmp_path: Path, entries: list[str], cased: bool) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*CASED[:5], *entries]), encoding="utf-8")
    assert (load_tokenizer(tmp_path).normalizer.normalize_str("WHAT") == "WHAT") is cased


@pytest.mark.parametrize("lower", [True, False, None])
@pytest.mark.parametrize("accents", [True, False, None])
@pytest.mark.parametrize("chinese", [True, False, None])
def test_the_configuration_wins(tmp_path: Path, lower: bool | None, accents: bool | None, chinese: bool | None) -> None:
    from transformers import BertTokenizer

    (tmp_path / "vocab.txt").write_text("\n".join([*CASED, "e", "What中", "中", "what中"]))
    config = {"do_lower_case": lower, "strip_accents": accents, "tokenize_chinese_chars": chinese}
    given = {name: value for name, value in config.items() if value is not None}
    (tmp_path / "tokenizer_config.json").write_text("\ufeff" + json.dumps(given), encoding="utf-8")
    theirs = BertTokenizer(str(tmp_path / "vocab.txt"), **{"do_lower_case": False, **given})
    assert pieces(tmp_path, "What is É? What中") == theirs.tokenize("What is É? What中")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"do_lower_case": "false"}', "says do_lower_case='false'; it must be true or false"),
        ("[]", "must hold a JSON object"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_damaged_configuration_is_refused(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(CASED))
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_a_vocabulary_in_another_encoding_is_refused_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes("\n".join(CASED).encode("latin-1"))
    with pytest.raises(DataError, match=r"vocab.txt' is not UTF-8 text \(byte 0xe9 in line 18\)"):
        load_tokenizer(tmp_path)


#: Letters and what is special to the parts of a tokenizer.
PARTS = ["a", "b", "E", "\u00e9", "\u0301", " ", "  ", "\t", "\u00a0", "\x1c", "\u4e2d", "?", "[MASK]", "\u0130", "\n"]
ANY_TEXT = st.lists(st.sampled_from(PARTS))


@settings(max_examples=300)
@given(st.lists(ANY_TEXT, min_size=1, max_size=6))
def test_a_vocabulary_is_counted_as_if_text_by_text(texts: list[list[str]]) -> None:
    joined = ["".join(text) for text in texts] + ["a"]
    whole = build_tokenizer(joined, 100).get_vocab()
    apart = [text.replace(" ", "\n") for text in joined]  # which are cut into words by the tokenizer alone
    assert build_tokenizer(apart, 100).get_vocab() == whole


def _tokenizers() -> dict[str, Tokenizer]:
    plain = build_tokenizer(TEXTS, 200)
    found = {"ours": plain}
    for name in ("two words", "no ends", "template", "twice", "words", "prefix", "unsplit"):
        found[name] = Tokenizer.from_str(plain.to_str())
    found["two words"].add_tokens([AddedToken("is the", normalized=True)])
    found["no ends"].post_processor = None
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    found["template"].post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1 [SEP]:1", special_tokens=ends
    )
    found["twice"].post_processor = processors.TemplateProcessing(
        single="[CLS] $A $A", pair="[CLS] $A $B:1 $B:1 [SEP]", special_tokens=ends
    )
    found["words"].pre_tokenizer = pre_tokenizers.Whitespace()
    found["prefix"].normalizer = normalizers.Prepend("x ")
    found["unsplit"].pre_tokenizer = pre_tokenizers.Metaspace()
    return found


TOKENIZERS = _tokenizers()


@settings(max_examples=60)
@given(ANY_TEXT, st.none() | ANY_TEXT)
def test_tokens_are_counted_as_they_are_made(text: list[str], pair: list[str] | None) -> None:
    for tokenizer in TOKENIZERS.values():
        first, second = "a is the " + "".join(text), None if pair is None else "is the" + "".join(pair)
        counter = TokenCounter(tokenizer)
        tokenizer.enable_truncation(3)  # left over from a text that was read
        texts = [(first, second), ("is", None), (first, second)]
        expected = [len(encode_texts(tokenizer, *each, None)[0]) for each in texts]
        assert counter(texts).tolist() == counter(texts).tolist() == expected
        assert pickle.loads(pickle.dumps(counter))(texts[1:]).tolist() == expected[1:]


def test_only_what_is_known_is_counted_by_parts() -> None:
    known = {name for name, tokenizer in TOKENIZERS.items() if TokenCounter(tokenizer)._around is not None}
    assert known == {"ours", "template", "words"}


def test_more_parts_than_are_remembered_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("villa.datasets.text.KEPT_PARTS", 2)
    tokenizer = build_tokenizer(TEXTS, 200)
    counter = TokenCounter(tokenizer)
    for texts in [[(text, None)] for text in TEXTS * 2]:
        assert counter(texts).tolist() == [len(encode_texts(tokenizer, *texts[0], None)[0])]
    assert build_tokenizer(TEXTS, 200).get_vocab() == tokenizer.get_vocab()
