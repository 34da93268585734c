"""The recipes of LXMERT: their released values, and runs on generated data."""

import json
from pathlib import Path
from typing import Any

import pytest
from recipe_runs import SHORT, argument

from villa.cli.run import main
from villa.config import RunConfig, load

pytestmark = pytest.mark.usefixtures("elsewhere")

TASKS = ("vqa", "gqa", "nlvr2")


def recipe(task: str, *overrides: str) -> RunConfig:
    return load([argument(f"lxmert/{task}"), *overrides]).config


@pytest.mark.parametrize("task", TASKS)
def test_values_are_those_of_the_released_scripts(task: str) -> None:
    config: Any = recipe(task)
    gqa = task == "gqa"
    assert config.optimizer.lr == (1e-5 if gqa else 5e-5)
    assert (config.optimizer.name, config.optimizer.eps, config.optimizer.weight_decay) == ("bert_adam", 1e-6, 0.01)
    assert (tuple(config.optimizer.betas), config.optimizer.grouping) == ((0.9, 0.999), "all")
    assert (config.scheduler.name, config.scheduler.warmup) == ("warmup_linear", 0.1)
    assert (config.batch.examples, config.training.epochs, config.training.clip_norm) == (32, 4, 5.0)
    trainer, model = config.trainer, config.model
    assert (trainer.name, trainer.reference, trainer.modality, trainer.norm) == ("villa", "official", "text", "l2")
    assert (trainer.steps, trainer.text_step_size, trainer.text_radius) == (3, 1e-2 if gqa else 1e-3, None)
    assert (trainer.init, trainer.kl_weight, trainer.clean_loss, trainer.clean_logits) == (
        "zero",
        1.5,
        False,
        "attached",
    )
    assert trainer.kl_reduction == ("mean" if task == "nlvr2" else "batchmean")
    assert (model.language_layers, model.vision_layers, model.cross_layers, model.hidden_size) == (9, 5, 5, 768)
    assert (model.released, model.head) == (True, "nlvr2" if task == "nlvr2" else "answers")
    assert config.loss.name == ("cross_entropy" if task == "nlvr2" else "binary_cross_entropy")
    assert config.dataset.max_text_length == 20


@pytest.mark.parametrize("task", TASKS)
def test_without_perturbations_only_the_trainer_differs(task: str) -> None:
    plain: Any = recipe(task, "trainer=standard")
    given: Any = recipe(task)
    assert plain.trainer.name == "standard"
    assert (plain.optimizer, plain.model, plain.dataset) == (given.optimizer, given.model, given.dataset)


@pytest.mark.parametrize(("task", "trainer"), [("vqa", "villa"), ("gqa", "standard"), ("nlvr2", "villa")])
def test_a_recipe_runs_on_generated_data(task: str, trainer: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = [
        argument(f"lxmert/{task}"),
        "dataset.synthetic=true",
        f"output_dir={out}",
        "evaluation.every=2",
        *SHORT,
    ]
    assert main([*arguments, *(["trainer=standard"] if trainer == "standard" else [])]) == 0
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics
    assert (out / f"submission_test.{'csv' if task == 'nlvr2' else 'json'}").is_file()
    assert len((out / "predictions_test.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize("task", TASKS)
def test_without_data_the_files_are_named(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument(f"lxmert/{task}")]) == 2
    message = capsys.readouterr().err
    assert f"lxmert/{task}/train.json  (annotations" in message
    assert "dataset.synthetic=true" in message
    assert "Traceback" not in message
