"""The recipes of methods: they load, run on the easy task, and there is one for every trainer and preset."""

from pathlib import Path

import pytest
from recipe_runs import PROJECTS, argument

from villa.cli.run import main
from villa.config import load
from villa.registry import TRAINERS
from villa.trainers.noise import NoiseConfig
from villa.trainers.smart import SmartConfig

pytestmark = pytest.mark.usefixtures("elsewhere")

RECIPES = sorted(path.stem for path in (PROJECTS / "villa" / "methods").glob("[!_]*.yaml"))
QUICK = (
    "training.updates=2",
    "dataset.limit=16",
    "batch.examples=8",
    "evaluation.every=null",
    "logging.tensorboard=false",
)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_and_says_how(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = f"villa/methods/{name}"
    config = load([argument(recipe)]).config
    assert config.name == name
    assert config.output_dir == f"outputs/methods/{name}_seed0"
    text = (PROJECTS / f"{recipe}.yaml").read_text(encoding="utf-8")
    assert f"# villa_run config=projects/{recipe}.yaml\n" in text.partition("\n\n")[0]
    assert main([argument(recipe), *QUICK, "logging.figures=false", "logging.progress=off"]) == 0
    assert "note: trainer" not in capsys.readouterr().out
    assert (Path(config.output_dir) / "metrics.json").is_file()


def test_every_method_has_a_recipe() -> None:
    found = [load([argument(f"villa/methods/{name}")]).config for name in RECIPES]
    used = {(config.trainer.name, getattr(config.trainer, "preset", None)) for config in found}
    presets = {("smart", preset) for preset in SmartConfig.PRESETS} | {
        ("noise", preset) for preset in NoiseConfig.PRESETS
    }
    others = {"standard", "freelb", "villa", "fgm", "pgd", "rdrop"}
    assert used == presets | {(name, None) for name in others}
    assert others | {"smart", "noise"} <= {*TRAINERS.names()}
    assert {config.training.weight_perturbation.name for config in found} == {"none", "sam", "awp"}
    assert any(config.training.ema for config in found)


def test_dropout_masks_that_are_none_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    options = (*QUICK, "logging.figures=false", "logging.progress=off")
    assert main([argument("villa/easy_vqa"), "trainer=rdrop", *options]) == 0
    told = " ".join(capsys.readouterr().out.split())  # lines are wrapped
    assert "note: trainer 'rdrop' compares dropout masks, but the model has no dropout" in told
