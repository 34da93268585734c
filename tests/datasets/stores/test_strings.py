"""Texts as arrays read like lists and dictionaries of texts, whatever the texts are."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from villa.datasets.uniter import keys as keys_module
from villa.datasets.uniter.image_names import ImageNames
from villa.datasets.uniter.keys import Keys, distinct
from villa.datasets.uniter.strings import Strings, hash_text

#: Of all kinds: empty, long, not ASCII, with zeros, with halves of surrogate pairs.
TEXTS = st.text(st.characters(exclude_categories=())) | st.sampled_from(["", "\0", "a\0", "a" * 7, "a" * 8, "a" * 40])


@settings(deadline=None, max_examples=60)
@given(st.lists(TEXTS, max_size=30))
def test_texts_come_back(texts: list[str]) -> None:
    strings = Strings.of(texts)
    assert (list(strings), len(strings), strings[1:5:2]) == (texts, len(texts), texts[1:5:2])
    assert strings == texts
    assert [int(h) for h in strings.hashes(0, len(texts))] == [
        hash_text(text.encode("utf-8", "surrogatepass")) for text in texts
    ]
    rows = np.arange(len(texts))[::-2]
    assert list(strings.take(rows)) == list(strings.take(rows).compact()) == texts[::-2]
    assert strings.take(rows).take(np.arange(len(rows))[:2]) == texts[::-2][:2]


@settings(deadline=None, max_examples=60)
@given(st.lists(TEXTS, max_size=30, unique=True), st.lists(TEXTS, max_size=10))
def test_texts_are_found_by_comparison_and_not_by_hash_alone(texts: list[str], others: list[str]) -> None:
    place = {text: row for row, text in enumerate(texts)}
    asked = others + texts[::-1]
    for bits in (None, 0):  # with no bit of the hash, all texts collide
        with pytest.MonkeyPatch.context() as patch:
            if bits == 0:
                patch.setattr(keys_module, "_low_bits", lambda count: (1 << 64) - 1)
            keys = Keys.of(Strings.of(texts))
            assert [keys.find(text) for text in asked] == [place.get(text) for text in asked]
            assert keys.find_all(Strings.of(asked)).tolist() == [place.get(text, -1) for text in asked]
            assert keys.find_all(Strings.of(texts)).tolist() == list(range(len(texts)))
            first, codes = distinct(Strings.of(asked))
            assert [asked[row] for row in first] == list(dict.fromkeys(asked))
            assert [asked[first[code]] for code in codes] == asked


def test_a_text_that_is_there_twice_is_named() -> None:
    with pytest.raises(ValueError, match="'b' twice"):
        Keys.of(Strings.of(["a", "b", "c", "b"]))


def test_names_of_images_single_and_in_lists() -> None:
    given_names: list[str | list[str]] = ["b", ["a", "b"], ["c", "a"], [], "c", ["d", "b"]]
    names = ImageNames.of(given_names)
    assert list(names) == given_names
    assert names[1:3] == given_names[1:3]
    assert list(names.take(np.array([5, 3, 0]))) == [["d", "b"], [], "b"]
    assert list(names.mentioned()) == ["b", "a", "c", "d"]
    assert list(names.single()) == ["b", "c"]
    sizes = np.array([{"a": 1, "b": 2, "c": 3, "d": 4}[name] for name in names.distinct])
    assert names.total(sizes).tolist() == [2, 3, 4, 0, 3, 6]
    assert (names.first_list(), names.first_list(but=2)) == (1, 0)
    with pytest.raises(IndexError):
        names[6]
    plain = ImageNames.of("abca")
    assert list(plain.take(np.array([3, 1])).mentioned()) == ["a", "b"]
    assert list(plain.single()) == ["a", "b", "c"]
    assert (plain.first_list(), plain.first_list(but=2), plain[1:]) == (None, 0, ["b", "c", "a"])
    assert plain.total(np.array([5, 6, 7])).tolist() == [5, 6, 7, 5]
    pairs = ImageNames.of([["x", "1"], ["y", "1"], ["x", "2"]])
    assert [list(pairs.mentioned(column, 2)) for column in (0, 1)] == [["x", "y"], ["1", "2"]]


def test_many_texts_take_little_memory_and_are_found() -> None:
    count = 600_000  # more than are worked on at a time
    strings = Strings.of(f"image_{number:09}.npz" for number in range(count))
    assert strings.data.nbytes + strings.bounds.nbytes <= 23 * count + 100
    keys = Keys.of(strings)
    chosen = random.Random(0).sample(range(count), 2000)
    asked = Strings.of([f"image_{number:09}.npz" for number in chosen] + ["image_.npz"])
    assert keys.find_all(asked).tolist() == [*chosen, -1]
    assert keys.find_all(strings.take(np.array(chosen))).tolist() == chosen
