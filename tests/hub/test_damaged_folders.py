"""Folders of models in which something is damaged, or meant badly: the same weights, or a line that says what is."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from damage import damage, files, fuzz, same, sealed, seeds
from hypothesis import given
from saved_runs import train
from test_transformers_folders import TEXTS, text_classifier

import villa
from villa.errors import VillaError

ASKED = [{"question": text} for text in TEXTS]


def predict(folder: Path) -> dict[str, Any] | None:
    """The weights of a folder, whose model has answered; None where it was refused in one line."""
    try:
        predictor = villa.from_pretrained(folder)
        predictor.predict_many(ASKED)
    except VillaError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return None
    return predictor.parts.model.state_dict()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("text_classifier", tmp_path_factory.mktemp("trained"))


@pytest.fixture
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a copy goes, which hypothesis makes again and again."""
    folder = tmp_path_factory.mktemp("damaged") / "model"
    yield folder
    shutil.rmtree(folder.parent)


def copied(source: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(source, folder))


@pytest.fixture(scope="module", params=["saved", "checkpoint"])
def model(request: pytest.FixtureRequest, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with checksums, and the name of its manifest."""
    if request.param == "checkpoint":
        return next((trained / "checkpoints").glob("update_*")), "manifest.json"
    return villa.from_pretrained(trained).save_pretrained(tmp_path_factory.mktemp("saved") / "model"), (
        "villa/manifest.json"
    )


@pytest.fixture(scope="module")
def weights(model: tuple[Path, str]) -> dict[str, Any]:
    return villa.from_pretrained(model[0]).parts.model.state_dict()


@fuzz
@given(draw=seeds)
def test_no_damage_changes_the_weights(
    model: tuple[Path, str], weights: dict[str, Any], draw: random.Random, damaged: Path
) -> None:
    """Also where the manifest agrees with the damage, unless it is in the weights themselves."""
    source, manifest = model
    folder = copied(source, damaged)
    path = draw.choice(files(folder))
    damage(path, draw)
    agrees = draw.random() < 0.7
    if agrees:
        sealed(folder, path, manifest)
    found = predict(folder)
    if found is not None and not (agrees and path.suffix == ".safetensors"):
        assert same(found, weights)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_classifier(tmp_path_factory.mktemp("foreign") / "model")


@fuzz
@given(draw=seeds)
def test_folders_of_transformers(foreign: Path, draw: random.Random, damaged: Path) -> None:
    folder = copied(foreign, damaged)
    for path in draw.sample(files(folder), draw.choice([1, 1, 2])):
        damage(path, draw)
    predict(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_hidden_layers", 10**9), ("num_labels", 10**9), ("hidden_size", 10**5), ("vocab_size", 10**9)),
        *(("intermediate_size", 2**63), ("max_position_embeddings", 10**30), ("num_hidden_layers", [1])),
    ],
)
def test_a_configuration_that_claims_more_than_its_weights_takes_neither_memory_nor_time(
    name: str, value: Any, foreign: Path, damaged: Path
) -> None:
    folder = copied(foreign, damaged)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {name: value}))
    assert predict(folder) is None
    assert predict(foreign) is not None
