"""Masked words of VCR's texts: question, answer and rationale are masked one by one, by the rules of all texts."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from villa.datasets.uniter.pretraining import VcrPretraining, VcrPretrainingConfig

VCR: dict[str, Any] = {"train_text": ["txt_db/vcr_train.db"], "train_images": ["img_db/vcr_gt_train;img_db/vcr_train"]}
DRAWS = 400


@pytest.mark.parametrize(("kind", "count"), [("qa", 2), ("qar", 3)])
def test_every_part_has_masked_words_of_its_own(official_db: Path, kind: str, count: int) -> None:
    split: Any = VcrPretraining(VcrPretrainingConfig(root=str(official_db), objective="mlm", **VCR)).split("train")
    (part,) = (part for part in split.parts if part.kind == kind)
    meta = part.pair.text.meta
    cls_id, sep_id, mask_id, words = meta["CLS"], meta["SEP"], meta["MASK"], range(*meta["v_range"])
    found, drawn, forced, fates = 0, 0.0, 0.0, Counter[str]()
    for index in range(len(part)):
        stored = part.fields(index)
        texts = [stored["input_ids"], stored["input_ids_as"][stored["qa_target"]]]
        texts += [stored["input_ids_rs"][stored["qar_target"]]] if kind == "qar" else []
        assert len(texts) == count
        assert all(texts)
        original = [cls_id, *(word for text in texts for word in (*text, sep_id))]
        for seed in range(index * DRAWS, index * DRAWS + DRAWS // len(part)):  # equal seeds draw alike
            example = part.draw(index, seed)
            mask, read = example.masked_tokens.tolist(), example.input_ids.tolist()
            assert example.rows.tolist() == [word for word, asked in zip(original, mask, strict=True) if asked]
            start = 1
            for text in texts:
                assert not mask[start - 1]  # [CLS], or [SEP]
                assert sum(mask[start : start + len(text)]) >= 1
                start += len(text) + 1
                # Each with a share of 15 %, and one where none was drawn.
                drawn, forced = drawn + 0.15 * len(text), forced + 0.85 ** len(text)
            assert not mask[-1]
            found += sum(mask)
            for word, seen, asked in zip(original, read, mask, strict=True):
                assert asked or word == seen
                assert seen in (word, mask_id) or seen in words
                if asked:
                    fates["mask" if seen == mask_id else "stays" if seen == word else "random"] += 1
    assert abs(found - drawn - forced) < 4 * math.sqrt(drawn)
    # 80 %, 10 % and 10 % of those that are drawn; the one of a part where none was drawn always becomes [MASK].
    assert abs(fates["mask"] - 0.8 * drawn - forced) < 4 * math.sqrt(drawn)
    assert abs(fates["random"] - 0.1 * drawn) < 4 * math.sqrt(0.1 * drawn)
