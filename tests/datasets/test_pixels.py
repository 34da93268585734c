"""Whole images without a processor: the data set's own word-pieces beside pixels."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from villa.batch import Batch
from villa.datasets.names import pixel_reading
from villa.datasets.own.easy_vqa import EasyVqa, EasyVqaConfig
from villa.datasets.own.jsonl import Jsonl, JsonlConfig
from villa.datasets.own.pictures import PictureStore
from villa.datasets.own.records import beside
from villa.datasets.stores import ImageSource
from villa.datasets.stream import evaluation_batches
from villa.errors import ConfigError, DataError

WriteLines = Callable[[str, list[Any]], str]

QUESTIONS = [
    {"image": "image0.png", "question": "what is this?", "answer": "cat"},
    {"image": "image1.png", "question": "is this a dog?", "answer": "no"},
]


def data(**options: Any) -> Jsonl:
    return Jsonl(JsonlConfig(**{"regions": "pixels", "image_size": 32, **options}))


def batch_of(dataset: Jsonl) -> Batch:
    split = dataset.split("train")
    return dataset.collate([split[index] for index in range(len(split))])


def pixels(path: Path, side: int = 32) -> torch.Tensor:
    """The definition: resized, RGB, from -1 to 1."""
    with Image.open(path) as image:
        values = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    return torch.from_numpy(values / 127.5 - 1).permute(2, 0, 1)


def test_images_are_resized_and_scaled(images: list[Path], write_lines: WriteLines) -> None:
    dataset = data(train=write_lines("train.jsonl", QUESTIONS))
    batch = batch_of(dataset)
    assert batch.pixel_values is not None
    torch.testing.assert_close(batch.pixel_values, torch.stack([pixels(images[0]), pixels(images[1])]))
    assert batch.features is batch.boxes is batch.token_type_ids is None
    assert batch.input_ids is not None
    words = Jsonl(JsonlConfig(train=dataset.config.train, regions="none"))
    assert batch.input_ids.equal(batch_of(words).input_ids)
    facts = dataset.facts()
    texts = words.facts()
    assert facts == replace(texts, reading={**texts.reading, "regions": "pixels", **pixel_reading(32)})
    assert facts.feature_dim is None
    assert list(dataset.split("train").lengths) == list(words.split("train").lengths)


@pytest.mark.usefixtures("images")
def test_the_usual_size(write_lines: WriteLines) -> None:
    batch = batch_of(data(train=write_lines("train.jsonl", QUESTIONS), image_size=None))
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape == (2, 3, 224, 224)


def test_several_images(images: list[Path], write_lines: WriteLines) -> None:
    records = [{"images": [f"image{n}.png", "image2.png"], "text": "same?", "answer": "no"} for n in range(2)]
    path = write_lines("train.jsonl", records)
    dataset = Jsonl(JsonlConfig(train=path, image_size=32))  # several images are pixels without being told
    batch = batch_of(dataset)
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape == (2, 2, 3, 32, 32)
    torch.testing.assert_close(batch.pixel_values[1, 0], pixels(images[1]))
    torch.testing.assert_close(batch.pixel_values[0, 1], batch.pixel_values[1, 1])
    with pytest.raises(
        DataError, match=r"mixed.jsonl:2: the line has 1 image\(s\) and no text_pair, the first 2 image"
    ):
        data(train=write_lines("mixed.jsonl", [records[0], QUESTIONS[0]])).split("train")
    asked = dataset.requests([{"images": [str(i) for i in images[:count]], "text": "same?"} for count in (1, 2)])
    with pytest.raises(DataError, match="a batch mixes examples of one and of several images"):
        dataset.collate([asked[0], asked[1]])


def test_two_texts(write_lines: WriteLines) -> None:
    records = [
        {"text": "a cat sleeps", "text_pair": "it is awake", "answer": "no"},
        {"text": "a dog", "text_pair": "an animal", "answer": "yes"},
    ]
    dataset = Jsonl(JsonlConfig(train=write_lines("train.jsonl", records)))
    batch, tokenizer = batch_of(dataset), dataset.vocabulary.tokenizer
    assert tokenizer is not None
    assert batch.input_ids is not None
    assert batch.token_type_ids is not None
    text = tokenizer.decode(batch.input_ids[0].tolist(), skip_special_tokens=False)
    assert text == "[CLS] a cat sleeps [SEP] it is awake [SEP]"
    assert batch.token_type_ids.tolist() == [[0] * 5 + [1] * 4, [0] * 4 + [1] * 3 + [0] * 2]
    assert list(dataset.split("train").lengths) == [9, 7]
    cut = Jsonl(JsonlConfig(train=dataset.config.train, max_text_length=7)).split("train")[0]
    assert len(cut.input_ids) == len(cut.token_type_ids) == 7  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"mixed.jsonl:2: the line has 0 image\(s\) and no text_pair, the first"):
        data(regions="none", train=write_lines("mixed.jsonl", [records[0], {"text": "a", "answer": "no"}])).split(
            "train"
        )


def test_easy_vqa_as_pixels(tmp_path: Path) -> None:
    options: dict[str, Any] = {"regions": "pixels", "image_size": 64, "limit": 4}
    dataset = EasyVqa(EasyVqaConfig(**options))
    split = dataset.split("train")
    (batch,) = evaluation_batches(split, dataset.collate, 4, workers=1)
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape == (4, 3, 64, 64)
    dataset.save_assets(tmp_path / "assets")
    loaded = EasyVqa(EasyVqaConfig(**options), assets=tmp_path / "assets")
    again = loaded.split("train")
    assert loaded.collate([again[0]]).pixel_values.equal(batch.pixel_values[:1])  # type: ignore[union-attr]
    assert loaded.facts() == dataset.facts()
    assert loaded.fingerprint() == dataset.fingerprint()
    other = EasyVqa(EasyVqaConfig(**options | {"image_size": 32}), assets=tmp_path / "assets")
    with pytest.raises(DataError, match=r"'whole images of 64 pixels a side', .* 'whole images of 32 pixels a side'"):
        other.facts()


@pytest.mark.usefixtures("images")
def test_requests_and_assets(tmp_path: Path, images: list[Path], write_lines: WriteLines) -> None:
    original = data(train=write_lines("train.jsonl", QUESTIONS))
    original.save_assets(tmp_path / "assets")
    loaded = Jsonl(JsonlConfig(image_size=32), assets=tmp_path / "assets")
    asked = loaded.requests([{"image": str(images[3]), "question": "what is this?"}])
    batch = loaded.collate([asked[0]])
    assert batch.targets is None
    torch.testing.assert_close(batch.pixel_values, pixels(images[3])[None])
    assert pickle.loads(pickle.dumps(asked))[0].images[0].equal(asked[0].images[0])


def test_files_beside_a_request(tmp_path: Path, images: list[Path]) -> None:
    found = beside(tmp_path, {"images": ["image0.png", "elsewhere.png", "x" * 5000], "text": "same?"})
    assert found == {"images": [str(images[0]), "elsewhere.png", "x" * 5000]}
    assert beside(tmp_path, {"image": "image0.png", "images": [3]}) == {"image": str(images[0])}


def test_broken_images_are_named(tmp_path: Path, write_lines: WriteLines) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "image0.png")
    whole = (tmp_path / "image0.png").read_bytes()
    (tmp_path / "image0.png").write_bytes(whole[: len(whole) // 2])
    split = data(train=write_lines("train.jsonl", QUESTIONS[:1])).split("train")
    with pytest.raises(DataError, match=r"train.jsonl:1: '.*image0.png' cannot be read as an image") as caught:
        split[0]
    assert "\n" not in str(caught.value)


def test_pictures_are_rgb_whatever_the_file(tmp_path: Path) -> None:
    sources = []
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (5, 7), 1).save(path)
        sources.append(ImageSource(path, "here"))
    store = PictureStore(sources)
    assert [(store[n].mode, store[n].size) for n in range(len(store))] == [("RGB", (5, 7))] * 5


@pytest.mark.parametrize("regions", ["pixels", "grid"])
def test_the_background_is_the_recipe_s(tmp_path: Path, write_lines: WriteLines, regions: Any) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    layered = picture.convert("RGBA")
    layered.paste((0, 255, 0, 0), (0, 0, 64, 40))
    layered.save(tmp_path / "image0.png")
    picture.paste("grey", (0, 0, 64, 40))
    picture.save(tmp_path / "image1.png")
    path = write_lines("train.jsonl", QUESTIONS)

    def seen(**options: Any) -> torch.Tensor:
        batch = batch_of(Jsonl(JsonlConfig(train=path, regions=regions, grid=1, image_size=64, **options)))
        values = batch.features if regions == "grid" else batch.pixel_values
        assert values is not None
        return values

    hidden, grey = seen(background="grey")
    assert hidden.equal(grey)
    white, grey = seen()
    assert not white.equal(grey)
    with pytest.raises(ConfigError, match=r"dataset.background='pinkish' is no opaque colour; give a name"):
        seen(background="pinkish")
