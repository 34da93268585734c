from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from shapes.dataset import Shapes, ShapesConfig

from villa.config import Loaded, from_yaml, load, to_yaml
from villa.config.variants import Overlay
from villa.registry import register_dataset


@dataclass
class ShrinkingConfig(ShapesConfig):
    OVERLAYS: ClassVar[tuple[Overlay, ...]] = (
        Overlay(
            {"tiny": True},
            {"training.updates": 2, "model.hidden_size": 8, "seed": 5, "dataset.examples": 4},
        ),
        Overlay({"tiny": True}, {"model.hidden_size": 4, "model.not_known": 1, "training.epochs": None}),
        Overlay({"tiny": True, "kind": "big"}, {"training.updates": 20}),
    )
    tiny: bool = False
    kind: str = "small"


@register_dataset("overlay_test")
class Shrinking(Shapes):
    """The example project's data with an option that shrinks a recipe."""

    Config = ShrinkingConfig


RECIPE = """\
model: {name: average, hidden_size: 64}
dataset: {name: overlay_test, examples: 100}
batch: {examples: 2}
training: {updates: 1000}
"""


@pytest.fixture(autouse=True)
def recipe_file(write: Callable[..., str]) -> None:
    write(RECIPE)


def tiny(*args: str) -> Loaded:
    return load(["config=recipe.yaml", *args])


def test_an_option_lays_values_over_the_recipe_and_names_itself_as_their_origin() -> None:
    loaded = tiny("dataset.tiny=true")
    assert (loaded.config.training.updates, loaded.config.model.hidden_size, loaded.config.seed) == (2, 8, 5)
    assert loaded.config.dataset.examples == 4
    assert str(loaded.origins["training.updates"]) == "dataset.tiny=true"
    assert loaded.notices == []


def test_nothing_changes_without_it() -> None:
    assert tiny().config.training.updates == 1000
    assert tiny("dataset.tiny=false").config.model.hidden_size == 64


def test_the_command_line_wins_over_an_overlay() -> None:
    for order in (["dataset.tiny=true", "training.updates=7"], ["training.updates=7", "dataset.tiny=true"]):
        assert tiny(*order).config.training.updates == 7
    assert tiny("dataset.tiny=true", "training.epochs=3").config.training.updates is None


def test_an_overlay_may_depend_on_other_options_wherever_they_are_set(write: Callable[..., str]) -> None:
    assert tiny("dataset.tiny=true", "dataset.kind=big").config.training.updates == 20
    write("includes: recipe.yaml\ndataset: {kind: big}", "big.yaml")
    assert load(["config=big.yaml"]).config.training.updates == 1000
    assert load(["config=big.yaml", "dataset.tiny=true"]).config.training.updates == 20


def test_a_file_that_turns_it_on_keeps_its_own_values(write: Callable[..., str]) -> None:
    write("includes: recipe.yaml\ndataset: {tiny: true}\nseed: 9", "tiny.yaml")
    config = load(["config=tiny.yaml"]).config
    assert (config.training.updates, config.seed) == (2, 9)
    assert load(["config=tiny.yaml", "dataset.tiny=false"]).config.training.updates == 1000


def test_a_saved_recipe_gives_the_same_configuration() -> None:
    config = tiny("dataset.tiny=true", "training.updates=7", "model.hidden_size=16").config
    Path("saved.yaml").write_text(to_yaml(config))
    assert from_yaml("saved.yaml") == config


def test_values_of_a_section_that_does_not_know_all_of_them_are_left_out() -> None:
    assert tiny("dataset.tiny=true").config.model.hidden_size == 8  # not 4, which stands beside an unknown option


def test_another_data_set_leaves_the_overlay_behind() -> None:
    loaded = tiny("dataset=shapes")
    assert loaded.config.training.updates == 1000
