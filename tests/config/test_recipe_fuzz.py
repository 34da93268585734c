"""Random recipes of all registered classes load, and load again as they are saved, or are refused in one line."""

import os
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from recipes import recipes

from villa.config import annotated, from_yaml, load, to_yaml
from villa.config.values import show
from villa.errors import VillaError

fuzz = settings(
    max_examples=int(os.environ.get("VILLA_FUZZ_EXAMPLES", "50")),
    phases=[Phase.explicit, Phase.generate],  # shrinking would take minutes
)


@fuzz
@given(args=recipes())
def test_any_recipe(args: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        loaded = load(args)
    except VillaError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return
    path = Path(tmp_path_factory.getbasetemp()) / "again.yaml"
    path.write_text(to_yaml(loaded.config), encoding="utf-8")
    assert show(from_yaml(path)) == show(loaded.config)
    assert annotated(loaded.config, loaded.origins, loaded.notices)


@pytest.mark.parametrize("number", [10**309, -(10**400), 2**63, -(2**63) - 1])
@pytest.mark.parametrize("key", ["scheduler.warmup", "trainer.steps", "model.hidden_size", "seed", "scheduler.total"])
def test_numbers_beyond_64_bits_are_refused(key: str, number: int) -> None:
    base = ["model=uniter", "dataset=jsonl", "trainer=villa", "batch.examples=8", "training.updates=1"]
    with pytest.raises(VillaError, match=rf"^{key} = .*\(command line\): must be .*, of a size below 2\^63$"):
        load([*base, f"{key}={number}"])


def test_numbers_of_free_options_are_shown_whatever_their_size() -> None:
    base = ["model=huggingface", "model.checkpoint=x", "dataset=jsonl", "batch.examples=8", "training.updates=1"]
    loaded = load([*base, f"model.options.a={10**400}"])
    assert f"a: {10**400}   # command line" in annotated(loaded.config, loaded.origins)
