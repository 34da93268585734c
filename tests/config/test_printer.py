from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from villa.config import annotated, from_yaml, load, to_yaml
from villa.config.values import is_one_line


def test_the_resolved_configuration_loads_again(recipe: str) -> None:
    config = load([recipe, "optimizer.lr_multipliers={a.b: 2}", "name=1e3", "seed=5"]).config
    Path("resolved.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert from_yaml("resolved.yaml") == config
    assert "output_dir: out/villa/s5\n" in to_yaml(config)


def test_every_value_shows_its_origin(recipe: str) -> None:
    loaded = load([recipe, "trainer=freelb", "optimizer.lr_multipliers.a.b=2"])
    text = annotated(loaded.config, loaded.origins, loaded.notices)
    lines = text.splitlines()
    assert lines[0] == "# dropped trainer.reference (recipe.yaml:5): not an option of trainer 'freelb'"
    assert "  steps: 4   # recipe.yaml:6" in lines
    assert "    a.b: 2.0   # command line" in lines
    assert "seed: 0   # default" in lines
    assert all("   # " in line or line.endswith(":") for line in lines[2:])
    Path("again.yaml").write_text(text, encoding="utf-8")
    assert from_yaml("again.yaml") == loaded.config


def test_presets_are_origins(recipe: str) -> None:
    loaded = load([recipe])
    assert "  modality: text   # preset 'official'" in annotated(loaded.config, loaded.origins).splitlines()


@settings(max_examples=30)
@given(
    name=(st.text(min_size=1) | st.text("${}\\:#'\"ab 0", min_size=1)).filter(is_one_line),
    rate=st.floats(0, exclude_min=True, allow_infinity=False),
)
def test_any_text_and_number_survive(recipe: str, name: str, rate: float) -> None:
    config = load([recipe]).config
    config = replace(config, name=name, optimizer=replace(config.optimizer, lr=rate))
    Path("resolved.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert from_yaml("resolved.yaml") == config
