"""Masks against the release's draws, and their distribution."""

import json
import random
from collections import Counter

import pytest
import torch
from golden_utils import GOLDEN, load
from pretraining_cases import golden_batch

from villa.datasets.uniter.pretraining_splits import mask_regions, mask_words, wrong_image

MASK, VOCABULARY = 103, (106, 500)
#: What python's generator was seeded with before the released data set was read.
SEED, VCR_SEED = 12, 13


@pytest.mark.parametrize("case", json.loads((GOLDEN / "misc" / "random_word.json").read_text()), ids=str)
def test_words_equal_the_release(case: dict[str, list[int]]) -> None:
    words, asked = mask_words(case["tokens"], MASK, VOCABULARY, random.Random(case["seed"]))
    assert words == case["out"]
    assert [word if asked else -1 for word, asked in zip(case["tokens"], asked, strict=True)] == case["labels"]


def test_captions_of_a_golden_batch_equal_the_release() -> None:
    golden, draws = load("pretrain", "mlm"), random.Random(SEED)
    for raw, ids, labels in zip(
        golden["raw_input_ids"], golden["batch"]["input_ids"], golden["batch"]["txt_labels"], strict=True
    ):
        words, asked = mask_words(raw, MASK, VOCABULARY, draws)
        assert ids[1 : len(raw) + 1].tolist() == words
        assert (labels[1 : len(raw) + 1] != -1).tolist() == asked


def test_questions_and_answers_of_vcr_are_masked_apart_as_in_the_release() -> None:
    golden, draws = load("pretrain_vcr", "qa_mlm")["batch"], random.Random(VCR_SEED)
    for read, labels in zip(golden["input_ids"], golden["txt_labels"], strict=True):
        original = torch.where(labels == -1, read, labels)[read != 0].tolist()
        middle = original.index(102)
        parts = original[1:middle], original[middle + 1 : -1]
        found = [mask_words(part, MASK, VOCABULARY, draws)[0] for part in parts]
        assert [101, *found[0], 102, *found[1], 102] == read[read != 0].tolist()


@pytest.mark.parametrize("name", ["mrfr", "mrckl"])
def test_regions_of_a_golden_batch_equal_the_release(name: str) -> None:
    batch, draws = golden_batch(load("pretrain", name)["batch"], name), random.Random(SEED)
    assert batch.region_mask is not None
    assert batch.masked_regions is not None
    for real, masked in zip(batch.region_mask, batch.masked_regions, strict=True):
        count = int(real.sum())
        assert masked[:count].tolist() == mask_regions(count, draws)


def test_shares_of_masked_words() -> None:
    """15 %, and of these 80 % [MASK], 10 % any word, 10 % kept; within four standard errors."""
    draws, count = random.Random(0), 200_000
    words = [draws.randrange(*VOCABULARY) for _ in range(count)]
    read, asked = mask_words(words, MASK, VOCABULARY, draws)
    became = Counter(
        "mask" if new == MASK else "kept" if new == old else "other"
        for old, new, wanted in zip(words, read, asked, strict=True)
        if wanted
    )
    total = sum(asked)
    assert total / count == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / count) ** 0.5)
    for kind, share in (("mask", 0.8), ("other", 0.1), ("kept", 0.1)):
        assert became[kind] / total == pytest.approx(share, abs=4 * (share * (1 - share) / total) ** 0.5 + 0.1 / 394)
    assert all(old == new for old, new, wanted in zip(words, read, asked, strict=True) if not wanted)
    drawn = {new for old, new, wanted in zip(words, read, asked, strict=True) if wanted and new not in (old, MASK)}
    assert drawn <= set(range(*VOCABULARY))
    assert len(drawn) > 380  # of 394


def test_something_is_always_masked() -> None:
    """The first word where none was drawn; any region."""
    words, regions = Counter[int](), Counter[int]()
    for seed in range(2000):
        read, asked = mask_words([200, 201, 202], MASK, VOCABULARY, random.Random(seed), 0.0)
        assert (read, asked) == ([MASK, 201, 202], [True, False, False])
        words.update(
            place
            for place, wanted in enumerate(mask_words([7] * 3, MASK, VOCABULARY, random.Random(seed))[1])
            if wanted
        )
        masked = mask_regions(4, random.Random(seed), 0.0)
        assert sum(masked) == 1
        regions.update([masked.index(True)])
    assert words[0] > 2 * words[1]
    assert all(400 < regions[place] < 600 for place in range(4))
    assert mask_words([], MASK, VOCABULARY, random.Random(0)) == ([], [])
    assert mask_regions(0, random.Random(0)) == []


def test_shares_of_masked_regions() -> None:
    masked = mask_regions(100_000, random.Random(0))
    assert sum(masked) / 100_000 == pytest.approx(0.15, abs=0.0046)
    assert all(mask_regions(9, random.Random(1), 1.0))


def test_wrong_images_are_any_but_the_right_one() -> None:
    draws, images = random.Random(0), [7, 3, 9, 5]
    drawn = Counter(wrong_image(images, 3, draws) for _ in range(6000))
    assert drawn.keys() == {7, 9, 5}
    assert all(1840 < count < 2160 for count in drawn.values())


def test_the_generator_decides() -> None:
    words = list(range(200, 260))
    first, same, other = (mask_words(words, MASK, VOCABULARY, random.Random(seed)) for seed in (3, 3, 4))
    assert first == same
    assert first != other
