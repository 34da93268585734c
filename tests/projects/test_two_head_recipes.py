"""The recipes of VisualBERT and ViLT: their values, and runs on generated data, tiny weights and real pixels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processor_batches import tiny_folder
from recipe_runs import SHORT, argument

from villa.cli.run import main
from villa.config import RunConfig, load

pytestmark = pytest.mark.usefixtures("elsewhere")

QUICK = (
    "training.updates=2",
    "logging.tensorboard=false",
    "logging.figures=false",
    "logging.progress=off",
    "evaluation.every=null",
)


def recipe(name: str, *overrides: str) -> RunConfig:
    return load([argument(name), *overrides]).config


@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
def test_values_of_visual_bert(task: str) -> None:
    config: Any = recipe(f"visual_bert/{task}")
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay) == ("bert_adam", 2e-5, 0.01)
    assert (config.scheduler.name, config.scheduler.warmup) == ("warmup_linear", 0.1)
    assert (config.batch.examples, config.training.epochs) == (64, 10)
    assert config.training.clip_norm == {"vqa": 0.25, "nlvr2": 1.0}[task]
    assert config.trainer.name == "villa"
    assert recipe(f"visual_bert/{task}", "trainer=standard").optimizer == config.optimizer


@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
def test_values_of_vilt(task: str) -> None:
    config: Any = recipe(f"vilt/{task}")
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay) == ("adamw", 1e-4, 0.01)
    assert (tuple(config.optimizer.betas), config.optimizer.eps) == ((0.9, 0.98), 1e-8)
    assert config.optimizer.head_lr_multiplier == {"vqa": 10.0, "nlvr2": 1.0}[task]
    assert (config.batch.examples, config.training.epochs) == ({"vqa": 256, "nlvr2": 128}[task], 10)
    assert (config.model.image_size, config.model.patch_size, config.model.max_positions) == (384, 32, 40)
    assert config.trainer.name == "villa"
    assert config.dataset.processor == config.model.checkpoint


@pytest.mark.parametrize(("task", "submission"), [("vqa", "json"), ("nlvr2", "csv")])
def test_visual_bert_runs_on_generated_data(task: str, submission: str) -> None:
    arguments = [argument(f"visual_bert/{task}"), "dataset.synthetic=true", "output_dir=run", *SHORT]
    assert main([*arguments, "evaluation.every=null"]) == 0
    assert json.loads(Path("run/metrics.json").read_text())["test"]
    assert Path(f"run/submission_test.{submission}").is_file()


def write_pictures(task: str) -> list[str]:
    """Write pictures of noise of two shapes, and lines about them; return the arguments of the data set."""
    random = np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    for number in range(8):
        height = 48 if number % 2 else 80
        Image.fromarray(random.integers(0, 255, (height, 64, 3), dtype=np.uint8)).save(f"{number}.png")
        if task == "vqa":
            lines.append({"question": "what is it", "image": f"{number}.png", "answers": {"cat": 1.0, "dog": 0.3}})
        else:
            two = [f"{number}.png", f"{number - number % 2}.png"]
            lines.append({"question": "is it red", "images": two, "answer": "False" if number % 3 else "True"})
    Path("data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("answers.txt").write_text("cat\ndog\nbird\n" if task == "vqa" else "False\nTrue\n")
    return [*(f"dataset.{split}=data.jsonl" for split in ("train", "val", "test")), "dataset.answers=answers.txt"]


@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
def test_vilt_runs_on_whole_images_and_tiny_weights(task: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder("vilt", cache)
    stored = json.loads((folder / "config.json").read_text())
    names = {
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size",
        "vocab_size": "vocab_size",
        "image_size": "image_size",
        "patch_size": "patch_size",
        "max_positions": "max_position_embeddings",
    }
    sizes = [f"model.{ours}={stored[theirs]}" for ours, theirs in names.items()]
    small = ["batch.examples=4", "batch.per_pass=2", "training.epochs=null", "training.precision=fp32"]
    small += ["training.workers=0", "output_dir=run", f"model.checkpoint={folder}"]
    assert main([argument(f"vilt/{task}"), *write_pictures(task), *sizes, *small, *QUICK]) == 0
    monitor = {"vqa": "soft_accuracy", "nlvr2": "accuracy"}[task]
    assert 0 <= json.loads(Path("run/metrics.json").read_text())["test"][monitor] <= 1
    printed = capsys.readouterr()
    assert "tensors loaded" in printed.out + printed.err


def test_a_small_vilt_learns_on_pixels() -> None:
    arguments = [argument("vilt/easy_vqa"), "output_dir=run", "dataset.limit=64", *QUICK, "training.updates=12"]
    few = ["batch.examples=32", "trainer=standard", "logging.every=1"]
    assert main([*arguments, *few]) == 0
    records = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record.get("kind") == "train"]
    assert len(losses) == 12
    assert sum(losses[-4:]) < sum(losses[:4])
