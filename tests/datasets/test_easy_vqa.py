from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from villa.batch import Batch
from villa.datasets.own.easy_vqa import EasyVqa, EasyVqaConfig
from villa.errors import ConfigError, DataError
from villa.registry import DATASETS


def data(**options: Any) -> EasyVqa:
    return EasyVqa(EasyVqaConfig(**options))


def text_only(**options: Any) -> EasyVqa:
    return data(regions="none", **options)


def test_registered() -> None:
    assert DATASETS.get("easy_vqa") is EasyVqa


def test_sizes_of_the_splits() -> None:
    splits = {name: text_only().split(name) for name in ("train", "val", "test")}
    assert {name: len(split) for name, split in splits.items()} == {"train": 36630, "val": 1945, "test": 9673}
    assert len(splits["train"]) + len(splits["val"]) == 38575
    assert text_only().facts().num_labels == 13


def test_validation_images_are_not_trained_on() -> None:
    dataset = text_only(val_images=50)
    train, val = ({question.image for question in dataset._questions(name)} for name in ("train", "val"))
    assert len(val) == 50
    assert len(train | val) == 4000
    assert not train & val


def test_fractions_are_nested_and_depend_on_their_seed() -> None:
    ids = {
        (share, seed): {example.id for example in text_only(fraction=share, fraction_seed=seed).split("train")}  # type: ignore[attr-defined]
        for share, seed in ((0.01, 0), (0.02, 0), (0.01, 1))
    }
    assert len(ids[0.01, 0]) == 366
    assert ids[0.01, 0] < ids[0.02, 0]
    assert ids[0.01, 0] != ids[0.01, 1]


def test_questions_that_are_left_out_are_counted() -> None:
    few = text_only(fraction=0.5, limit=1)
    assert few.split("train").warnings() == [
        "dataset.fraction=0.5, dataset.limit=1: 36,629 of 36,630 questions are left out"
    ]
    assert few.split("val").warnings() == ["dataset.limit=1: 1,944 of 1,945 questions are left out"]
    assert text_only(limit=50_000).split("train").warnings() == []


def test_examples_with_regions() -> None:
    dataset = data(grid=2, limit=10)
    split = dataset.split("train")
    assert len(split) == 10
    batch = dataset.collate([split[index] for index in range(10)])
    assert batch.features is not None
    assert batch.features.shape == (10, 4, 1280)
    assert batch.boxes is not None
    assert batch.boxes.shape == (10, 4, 4)
    assert batch.input_ids is not None
    tokenizer = dataset.vocabulary.tokenizer
    assert tokenizer.decode(batch.input_ids[0].tolist()) == "what is the blue shape ?"
    assert batch.targets is not None
    assert dataset.vocabulary.answers[int(batch.targets[0])] == "rectangle"
    assert batch.features[0].equal(batch.features[1])  # of the same image
    assert list(split.lengths) == [len(split[index].input_ids) + 4 for index in range(10)]
    assert dataset.facts().feature_dim == 1280


def test_reference_scores_are_the_known_ones() -> None:
    scores = text_only(val_images=0).reference_scores("test")
    assert scores["majority"] == pytest.approx(0.373, abs=5e-4)
    assert scores["question_only"] == pytest.approx(0.670, abs=5e-4)


def test_requests_and_answers(images: list[Path]) -> None:
    dataset = data(grid=2)
    records = [
        {"image": str(images[0]), "question": "what color is the shape?", "id": "mine"},
        {"image": str(images[1]), "question": "is there a circle?"},
    ]
    split = dataset.requests(records)
    batch = dataset.collate([split[0], split[1]])
    assert batch.ids == ["mine", "2"]
    assert batch.targets is None
    assert batch.features is not None
    assert not batch.features[0].equal(batch.features[1])
    logits = torch.zeros(2, 13)
    logits[0, 3], logits[1, 4] = 5.0, 9.0
    first, second = dataset.decode(logits, Batch(["0", "1"]))
    assert (first["answer"], second["answer"]) == ("gray", "yes")
    assert first["score"] == pytest.approx(float(logits[0].softmax(0)[3]))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "what?"}, r"record 1: 'image' is missing \(present: question\)"),
        ({"image": "a.png", "question": " "}, r"record 1: 'question' is ' '; it must be a text"),
        ({"image": "none.png", "question": "what?"}, r"record 1: cannot read 'none.png' \(No such file"),
    ],
)
def test_bad_requests_are_refused(record: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        data(grid=2).requests([record])


def test_assets_replace_the_training_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: list[Path]) -> None:
    config = EasyVqaConfig(grid=2)
    original = EasyVqa(config)
    original.save_assets(tmp_path / "assets")
    monkeypatch.setattr("villa.datasets.own.easy_vqa._read", None)
    loaded = EasyVqa(config, assets=tmp_path / "assets")
    assert loaded.facts() == original.facts()
    record = {"image": str(images[0]), "question": "what color is the shape?"}
    assert loaded.requests([record])[0].input_ids.equal(original.reader.words("what color is the shape?", None)[0])


def test_assets_of_another_extractor_are_refused(tmp_path: Path) -> None:
    data(grid=2).save_assets(tmp_path / "assets")
    with pytest.raises(DataError, match=r"set dataset.grid and dataset.image_size as in training"):
        EasyVqa(EasyVqaConfig(grid=1), assets=tmp_path / "assets").facts()


def test_damaged_assets_are_refused(tmp_path: Path) -> None:
    text_only().save_assets(tmp_path)
    (tmp_path / "answers.json").write_text("[")
    with pytest.raises(DataError, match=r"answers.json'; use a checkpoint with its assets folder"):
        EasyVqa(EasyVqaConfig(regions="none"), assets=tmp_path).facts()


def test_fingerprint_tells_options_apart() -> None:
    choices: list[dict[str, Any]] = [{}, {"fraction": 0.5}, {"limit": 10}, {"cache_dir": "x"}]
    prints = {text_only(**options).fingerprint() for options in choices}
    assert len(prints) == 3  # the place of the cache changes no example


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, r"dataset.fraction=0.0"),
        ({"limit": 0}, "dataset.limit=0"),
        ({"val_images": -1}, "dataset.val_images=-1"),
        ({"max_text_length": 2}, "dataset.max_text_length=2 is too small"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data(**options)


def test_missing_splits_are_refused() -> None:
    with pytest.raises(DataError, match=r"no split 'tset'; did you mean 'test'\? \(known: train, val, test\)"):
        text_only().split("tset")
    with pytest.raises(DataError, match=r"no split 'val' with dataset.val_images=0"):
        text_only(val_images=0).split("val")
    with pytest.raises(ConfigError, match="leaves none of 4000 images"):
        text_only(val_images=4000).split("train")
