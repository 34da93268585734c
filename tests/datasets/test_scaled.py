"""Standardised region features: their statistics, and that a checkpoint's are those of training."""

from pathlib import Path

import numpy as np
import pytest
import torch

from villa.datasets.own.assets import facts_beside
from villa.datasets.own.files import FileStore
from villa.datasets.own.jsonl import Jsonl, JsonlConfig
from villa.datasets.stores import SMALLEST_SCALE, ImageSource, ScaledStore, Scaling
from villa.errors import DataError
from villa.models.matching import Matching


def feature_file(folder: Path, name: str, seed: int) -> Path:
    draw = np.random.default_rng(seed)
    features = draw.normal(5.0, [1.0, 10.0, 0.0, 2.0], (3 + seed, 4)).astype(np.float32)
    boxes = np.tile(np.array([0.0, 0.0, 1.0, 1.0], dtype=np.float32), (len(features), 1))
    np.savez(folder / name, features=features, boxes=boxes)
    return folder / name


def make(folder: Path) -> FileStore:
    return FileStore([ImageSource(feature_file(folder, f"{i}.npz", i), "test") for i in range(4)])


def test_statistics_are_those_of_all_regions_of_the_sample(tmp_path: Path) -> None:
    store = make(tmp_path)
    scaling = Scaling.fit(store, [0, 2])
    together = np.concatenate([np.load(tmp_path / f"{i}.npz")["features"] for i in (0, 2)])
    np.testing.assert_allclose(scaling.mean, together.mean(0), rtol=1e-5)
    deviation = together.std(0)
    np.testing.assert_allclose(scaling.scale[[0, 1, 3]], deviation[[0, 1, 3]], rtol=1e-5)
    assert scaling.scale[2] == pytest.approx(SMALLEST_SCALE * deviation.mean(), rel=1e-5)  # it does not vary
    scaled = torch.cat([ScaledStore(store, scaling)[i][0] for i in (0, 2)])
    torch.testing.assert_close(scaled.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(scaled[:, [0, 1, 3]].std(0, correction=0), torch.ones(3), rtol=1e-5, atol=0)
    assert ScaledStore(store, scaling).regions(3) == 6


def dataset(folder: Path, assets: Path | None = None, **options: object) -> Jsonl:
    lines = [f'{{"features": "{i}.npz", "question": "what is {i}?", "answer": "{i % 2}"}}' for i in range(4)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return Jsonl(JsonlConfig(train=str(folder / "train.jsonl"), **options), assets)  # type: ignore[arg-type]


def test_a_checkpoint_keeps_the_statistics_of_training(tmp_path: Path) -> None:
    make(tmp_path)
    trained = dataset(tmp_path, standardize=True)
    example = trained.split("train")[1]
    plain = dataset(tmp_path).split("train")[1]
    assert trained.scaling is not None
    assert example.features is not None
    assert plain.features is not None
    expected = (plain.features - trained.scaling.mean) / trained.scaling.scale
    torch.testing.assert_close(example.features, expected, rtol=0, atol=0)
    trained.save_assets(tmp_path / "assets")

    feature_file(tmp_path, "0.npz", 9)  # other training data must not matter any more
    loaded = dataset(tmp_path, tmp_path / "assets", standardize=True)
    request = loaded.requests([{"features": str(tmp_path / "1.npz"), "question": "what is 1?"}])
    assert request[0].features is not None
    torch.testing.assert_close(request[0].features, example.features, rtol=0, atol=0)


def test_assets_without_statistics_are_refused(tmp_path: Path) -> None:
    make(tmp_path)
    dataset(tmp_path).save_assets(tmp_path / "assets")
    assert not (tmp_path / "assets/features.safetensors").exists()
    with pytest.raises(DataError, match=r"cannot read '.*features.safetensors'"):
        dataset(tmp_path, tmp_path / "assets", standardize=True).split("train")


def test_training_goes_on_by_the_statistics_that_the_weights_were_trained_with(tmp_path: Path) -> None:
    make(tmp_path)
    trained = dataset(tmp_path, standardize=True)
    trained.save_assets(tmp_path / "assets")
    assert trained.scaling is not None
    for index in range(4):
        feature_file(tmp_path, f"{index}.npz", index + 9)
    own, plain = dataset(tmp_path, standardize=True), dataset(tmp_path)
    assert not torch.equal(dataset(tmp_path, standardize=True).scaling.mean, trained.scaling.mean)  # type: ignore[union-attr]
    assert "by the statistics of the checkpoint" in (own.carry(tmp_path / "assets") or "")
    assert own.scaling is not None
    assert torch.equal(own.scaling.mean, trained.scaling.mean)
    assert plain.carry(tmp_path / "assets") is None
    beside = facts_beside(str(tmp_path))
    assert beside.reading["region features"] == "standardised"
    assert Matching("run", beside, own.facts()).reading() == ()
    told = "region features standardised in training, as they are in the data"
    assert Matching("run", beside, plain.facts()).reading() == (told,)


def test_a_checkpoint_of_scaled_features_is_not_used_without(tmp_path: Path) -> None:
    make(tmp_path)
    dataset(tmp_path, standardize=True).save_assets(tmp_path / "assets")
    with pytest.raises(DataError, match=r"standardised region features; set dataset\.standardize=true"):
        dataset(tmp_path, tmp_path / "assets").split("train")
