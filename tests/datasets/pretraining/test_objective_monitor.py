"""The loss of an objective chooses the best checkpoint of a mixture; what such a run costs is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from villa.cli.run import main
from villa.config import load
from villa.errors import ConfigError

RECIPE = """
run_type: train
model: {name: uniter, head: pretraining, hidden_size: 16, num_layers: 1, num_heads: 2}
dataset:
  name: pretraining
  mix: {mlm: 2, mrfr: 1, mrc_kl: 1, itm_wra: 2, mrc: 0}
  train_text: [txt_db/pretrain_coco_train.db]
  train_images: [img_db/coco_train2014]
  val_text: [txt_db/pretrain_coco_val.db]
  val_images: [img_db/coco_train2014]
loss: {name: pretraining}
trainer: {name: villa, reference: paper, modality: alternating, steps: 2, objectives: [mlm, itm_wra]}
optimizer: {name: adamw, lr: 0.02}
batch: {examples: 4}
training: {updates: 8}
evaluation: {metrics: [mlm_accuracy], monitor: itm_wra_loss, mode: min, every: 2}
logging: {every: 5, tensorboard: false, progress: off}
device: cpu
"""
MLM_ALONE = [f"dataset.mix.{name}=0" for name in ("mrfr", "mrc_kl", "itm_wra")]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return f"config={path}"


def test_the_loss_of_an_objective_chooses_the_best_checkpoint(
    recipe: str, official_db: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main([recipe, f"dataset.root={official_db}", f"output_dir={folder}"]) == 0
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    values = {record["update"]: record for record in records if record["kind"] == "val"}
    assert values.keys() == {2, 4, 6, 8}
    best, other = (min(values, key=lambda update: values[update][name]) for name in ("itm_wra_loss", "loss"))
    assert best != other
    assert json.loads((folder / "checkpoints" / "best.json").read_text()) == {"update": best}
    # Two steps of two views and the clean pass are five times standard training; four updates of six are so trained.
    told = (
        "a micro-batch is 5 forward + 5 backward of mlm, itm_wra and 1 forward + 1 backward of mrfr, mrc_kl; "
        "on average 3.7x standard training"
    )
    assert told in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["evaluation.monitor=mml_loss"],
            "evaluation.monitor = 'mml_loss' (command line): must be one of loss, mlm_loss, mrfr_loss, mrc_kl_loss, "
            "itm_wra_loss, mlm_accuracy: the loss, that of an objective of the mixture, or one of evaluation.metrics; "
            "did you mean 'mlm_loss'?",
        ),
        (["evaluation.monitor=mrc_loss"], "must be one of loss, mlm_loss"),  # of weight 0
        (["evaluation.mode=max"], "evaluation.monitor=itm_wra_loss needs evaluation.mode=min"),
        (MLM_ALONE, "must be one of loss, mlm_accuracy: the loss or one of evaluation.metrics"),
    ],
)
def test_a_value_that_there_is_not_is_one_clear_line(recipe: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([recipe, *overrides])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
