"""What is cut out of plain JSON is what the parser finds, and what is not plain is left alone."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from villa.datasets.uniter.json_columns import plain_list, plain_numbers, plain_texts
from villa.datasets.uniter.strings import Strings, StringsBuilder, Texts

TEXTS = st.text(st.sampled_from("ab,:{}[] 0é"), max_size=6)
SEPARATORS = st.sampled_from([(", ", ": "), (",", ":"), (", ", ":"), (",", ": ")])
#: What somebody who copies or edits a file may do to it.
CHANGES = st.sampled_from(['"', ",", ":", " ", "{", "}", "[", "]", "\\", "0", "-", ".", "\n", "\x01", "1e5", "null"])


def strings(texts: Texts) -> Strings:
    builder = StringsBuilder()
    builder.add(texts)
    return builder.build()


def cut(piece: bytes) -> Any:
    """What each of the functions that take it makes of a piece."""
    found = []
    for name, function in (("list", plain_list), ("texts", plain_texts), ("numbers", plain_numbers)):
        try:
            made: Any = function(piece)
        except ValueError:
            continue
        columns = made if isinstance(made, tuple) else (made,)
        lists = [list(strings(column)) if isinstance(column, Texts) else column.tolist() for column in columns]
        found.append((name, lists[0] if len(lists) == 1 else list(zip(*lists, strict=True))))
    return found


VALUES = (
    st.lists(TEXTS, min_size=2, max_size=9)
    | st.dictionaries(TEXTS, TEXTS, min_size=2, max_size=9)
    | st.dictionaries(TEXTS, st.integers(0, 999_999_999), min_size=2, max_size=9)
)


@settings(deadline=None, max_examples=120)
@given(VALUES, SEPARATORS)
def test_plain_json_is_cut(value: Any, separators: tuple[str, str]) -> None:
    piece = json.dumps(value, ensure_ascii=False, separators=separators).encode()
    ((_, made),) = cut(piece)
    assert made == (value if isinstance(value, list) else list(value.items()))


@settings(deadline=None, max_examples=400)
@given(VALUES, SEPARATORS, CHANGES, st.integers(0, 10**6), st.integers(0, 2), st.booleans())
def test_what_is_cut_is_what_the_parser_finds(
    value: Any, separators: tuple[str, str], change: str, place: int, replaced: int, ascii_only: bool
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, separators=separators)
    at = place % (len(text) + 1)
    piece = (text[:at] + change + text[at + replaced :]).encode()
    for _, made in cut(piece):  # nothing, as a rule
        assert made == json.loads(piece, object_pairs_hook=list)


@pytest.mark.parametrize(
    "piece",
    [
        b"",
        b"{}",
        b"[]",
        b'["a"]',
        b'{"a": 1}',
        b'{"a": 1, "b": 2',
        b'{"a": 01, "b": 2}',
        b'{"a": 1234567890, "b": 2}',
        b'{"a": 1, "b": -2}',
        b'{"a": 1, "b": }',
        b'{"a": "b", "c" "d"}',
        b'{"a": , "b""c": "d"}',
        b'{"a": "b", "c": "d"}}',
        b'["a", "b",]',
        b'["a" , "b"]',
        b'["a", "b"] ["c"]',
        b'["\xff", "b"]',
        b'["a\x1f", "b"]',
        b'[1, "a", "b"]',
    ],
)
def test_what_is_not_plain_is_refused(piece: bytes) -> None:
    assert cut(piece) == []


def test_texts_with_numbers_have_the_same_hashes_in_any_order() -> None:
    texts, numbers = Strings.of(["a", "bb", "", "longer than eight"]), np.array([3, 1, 2, 1])
    order = np.array([2, 0, 3, 1])
    made = texts.hashes_with(numbers)
    assert made.tolist() == Strings.of(list(texts.take(order))).hashes_with(numbers[order]).tolist()
    assert made.tolist() != texts.hashes_with(numbers[order]).tolist()
    assert sorted(made) == made.tolist()
