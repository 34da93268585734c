import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from villa.datasets.base import TaskDataset
from villa.datasets.released import FACTS_FILE, ReleasedFilesConfig
from villa.errors import ConfigError, DataError
from villa.registry import DATASETS

EXAMPLES = 32


def task(name: str, assets: Path | None = None) -> TaskDataset:
    kind: Any = DATASETS.get(name)
    made: TaskDataset = kind(kind.Config(name=name, synthetic=True, synthetic_examples=EXAMPLES), assets)
    return made


@pytest.fixture(scope="module", autouse=True)
def generated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The data are made up once, outside the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VILLA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=["snli_ve", "lxmert_nlvr2"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def assets(name: str, tmp_path: Path) -> Path:
    task(name).save_assets(tmp_path / "assets")
    return tmp_path / "assets"


def test_a_checkpoint_s_facts_are_those_of_its_data(name: str, assets: Path) -> None:
    facts = task(name).facts()
    kept = json.loads((assets / FACTS_FILE).read_text())
    assert (kept["feature_dim"], kept["vocab_size"]) == (facts.feature_dim, facts.vocab_size)
    assert task(name, assets).facts() == facts


def test_features_of_another_width_are_refused(name: str, assets: Path) -> None:
    kept = json.loads((assets / FACTS_FILE).read_text())
    (assets / FACTS_FILE).write_text(json.dumps(kept | {"feature_dim": 7}))
    with pytest.raises(DataError, match="trained on region features 7 wide"):
        task(name, assets).facts()


@pytest.mark.parametrize("damage", [{"vocab_size": 300}, {"vocab_size": 300, "feature_dim": "6"}, [1], None])
def test_damaged_facts_are_named(name: str, assets: Path, damage: Any) -> None:
    (assets / FACTS_FILE).write_text(json.dumps(damage))
    with pytest.raises(DataError, match=rf"{FACTS_FILE}' does not hold the sizes.*; use a checkpoint with its assets$"):
        task(name, assets).facts()


@pytest.mark.parametrize("text", ["{", None])
def test_facts_that_cannot_be_read_are_named(name: str, assets: Path, text: str | None) -> None:
    (assets / FACTS_FILE).unlink()
    if text is not None:
        (assets / FACTS_FILE).write_text(text)
    with pytest.raises(DataError, match=rf"facts of the training data '.*{FACTS_FILE}'.*use a checkpoint with its ass"):
        task(name, assets).facts()


def test_the_other_splits_come_with_the_one_to_train_on(name: str) -> None:
    data = task(name)
    held_out = data.split("val")
    assert len(data.split("train")) == EXAMPLES
    assert data.split("val") is held_out
    assert len(data.split("test")) == EXAMPLES // 4


def test_too_few_generated_examples_are_refused() -> None:
    with pytest.raises(ConfigError, match="synthetic_examples=31 is too small; give at least 32"):
        ReleasedFilesConfig(synthetic_examples=31).check()
