"""The recipes of text alone: their values, and runs on written pairs and tiny checkpoints."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from processor_batches import tiny
from recipe_runs import PROJECTS, argument

from villa.cli.run import main
from villa.config import load

pytestmark = pytest.mark.usefixtures("elsewhere")

RECIPES = {"bert": "bert", "roberta": "roberta", "deberta": "deberta-v2"}


def write_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["write_pairs.py", "outputs/text/data"])
    runpy.run_path(str(PROJECTS / "text" / "write_pairs.py"), run_name="__main__")


def test_all_recipes_are_here() -> None:
    found = {path.stem for path in (PROJECTS / "text").glob("*.yaml") if not path.name.startswith("_")}
    assert found == RECIPES.keys()
    assert set(RECIPES.values()) == set(tiny.TEXT_ARCHITECTURES)


@pytest.mark.parametrize(
    ("recipe", "perturbation", "lr"),
    [
        ("bert", (3, 0.04, 0.08, None), 3e-5),
        ("roberta", (3, 0.1, 0.1, 0.3), 1e-5),
        ("deberta", (3, 0.05, 0.1, None), 2e-5),
    ],
)
def test_values_are_those_that_the_recipes_name(recipe: str, perturbation: tuple[Any, ...], lr: float) -> None:
    config: Any = load([argument(f"text/{recipe}")]).config
    trainer = config.trainer
    assert (trainer.name, trainer.modality, trainer.dropout, trainer.init) == ("freelb", "text", "shared", "uniform")
    assert (trainer.steps, trainer.text_step_size, trainer.init_scale, trainer.text_radius) == perturbation
    assert (config.optimizer.lr, config.dataset.processor) == (lr, config.model.checkpoint)
    assert config.model.architecture is None


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_and_its_run_needs_no_source(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(monkeypatch)
    folder = tiny.write_text(RECIPES[recipe], Path("tiny"))
    quick = ["training.epochs=null", "training.updates=2", "batch.examples=32", "evaluation.every=null"]
    quick += ["logging.tensorboard=false", "logging.figures=false", "logging.progress=off", "output_dir=run"]
    assert main([argument(f"text/{recipe}"), f"model.checkpoint={folder}", *quick]) == 0
    assert 0 <= json.loads(Path("run/metrics.json").read_text())["test"]["accuracy"] <= 1
    shutil.rmtree(folder)
    record = json.loads(Path("outputs/text/data/test.jsonl").read_text().splitlines()[0])
    Path("one.jsonl").write_text(json.dumps({k: record[k] for k in ("text", "text_pair")}))
    assert main(["run_type=predict", "checkpoint.path=run", "predict.input=one.jsonl", "predict.output=out.jsonl"]) == 0
    first = json.loads(Path("run/predictions_test.jsonl").read_text().splitlines()[0])
    assert json.loads(Path("out.jsonl").read_text())["answer"] == first["answer"]
