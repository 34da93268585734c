"""A dozen architectures of transformers through ``villa_run``: trained, tested, predicted with, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processor_batches import ANSWERS, GENERATIVE, TARGETS, tiny, tiny_folder, write_questions

import villa
from villa.checkpoints.store import load
from villa.cli.run import main
from villa.errors import DataError
from villa.facts import DataFacts, Task
from villa.models.huggingface.config import HuggingFaceConfig
from villa.models.huggingface.model import HuggingFaceModel

TASKS: dict[str, Task] = {
    **dict.fromkeys(tiny.ARCHITECTURES, "classification"),
    **dict.fromkeys(GENERATIVE, "generation"),
    **dict.fromkeys(("clip", "siglip", "blip"), "contrastive"),
}
SETTINGS = {
    "classification": ("cross_entropy", "accuracy"),
    "generation": ("language_model", "exact_match"),
    "contrastive": ("contrastive", "pair_retrieval"),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("huggingface")
    write_questions(folder)
    return folder


def arguments(name: str, work: Path, output: Path, *more: str, task: str | None = None) -> list[str]:
    task = TASKS[name] if task is None else task
    loss, metric = SETTINGS[task]
    folder, questions = tiny_folder(name, work), work / "questions.jsonl"
    return [
        *("model=huggingface", f"model.checkpoint={folder}", "dataset=jsonl", f"dataset.processor={folder}"),
        *(f"dataset.{split}={questions}" for split in ("train", "val", "test")),
        *(f"dataset.target={TARGETS[task]}", f"loss={loss}", f"evaluation.metrics=[{metric}]"),
        *(f"evaluation.monitor={metric}", f"output_dir={output}", "batch.examples=3", "training.updates=2"),
        *("logging.progress=off", "logging.tensorboard=false", "logging.figures=false", "logging.every=1", *more),
    ]


def records(output: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def weights(output: Path) -> dict[str, torch.Tensor]:
    """Those of a run's last checkpoint, tied ones under all their names."""
    return load(max((output / "checkpoints").glob("update_*"))).model_state()


def loaded(name: str, work: Path) -> dict[str, torch.Tensor]:
    """Those that a run starts from."""
    folder = str(tiny_folder(name, work))
    model = HuggingFaceModel.from_config(HuggingFaceConfig(checkpoint=folder), DataFacts(task=TASKS[name]))
    model.load_weights(folder)
    return dict(model.state_dict())


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_method_trains_every_architecture(name: str, work: Path, tmp_path: Path) -> None:
    for trainer in ("standard", "freelb", "villa"):
        perturbed = () if trainer == "standard" else ("trainer.modality=both",)
        output = tmp_path / trainer
        assert main(arguments(name, work, output, f"trainer={trainer}", *perturbed)) == 0
        steps = records(output, "train")
        assert len(steps) == 2
        for step in steps:
            values = [value for value in step.values() if isinstance(value, float)]
            assert all(torch.tensor(values).isfinite())
            if perturbed:
                assert step["pass2/text_delta"] > 0
                assert step["pass2/image_delta"] > 0
        lines = (output / "predictions_test.jsonl").read_text().splitlines()
        assert len(lines) == len(ANSWERS)


@pytest.mark.parametrize("name", ["clip", "vilt", "llava", "qwen2_vl"])
def test_a_trained_model_needs_neither_the_first_folder_nor_the_recipe(name: str, work: Path, tmp_path: Path) -> None:
    """Its checkpoint has the configuration and the processor; predictions are those of the test."""
    original = tiny_folder(name, work)
    assert main(arguments(name, work, tmp_path / "run", "trainer=villa", "trainer.modality=text")) == 0
    hidden = original.rename(tmp_path / "hidden")
    try:
        predictor = villa.from_pretrained(tmp_path / "run")
        lines = [json.loads(line) for line in (work / "questions.jsonl").read_text().splitlines()]
        asked = [{"image": str(work / line["image"]), "question": line["question"]} for line in lines]
        found = predictor.predict_many(asked)
    finally:
        hidden.rename(original)
    tested = [json.loads(line) for line in (tmp_path / "run" / "predictions_test.jsonl").read_text().splitlines()]
    assert [one["answer"] for one in found] == [one["answer"] for one in tested]
    assert [one["score"] for one in found] == pytest.approx([one["score"] for one in tested], rel=1e-4)
    if predictor.parts.data.facts().task == "generation":  # maps without an adversary, which is refused in a line
        shown = predictor.attention(image=asked[0]["image"], text=asked[0]["question"], attack=True)
        assert shown.movement is None
        assert shown.weights("1.mean").shape == (len(shown.tokens), len(shown.attention.boxes))
        with pytest.raises(DataError, match="the model writes its answers"):
            predictor.attack(image=asked[0]["image"], text=asked[0]["question"], radius=0.1)


def test_a_resumed_run_ends_like_one_that_was_not_stopped(work: Path, tmp_path: Path) -> None:
    options = ("trainer=villa", "trainer.modality=both", "model.lora_rank=2", "scheduler=constant", "batch.examples=2")
    assert main(arguments("llava", work, tmp_path / "whole", *options, "training.updates=4")) == 0
    part = arguments("llava", work, tmp_path / "part", *options)
    assert main([*part, "training.updates=2"]) == 0
    assert main([*part, "training.updates=4", "checkpoint.resume=true"]) == 0
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "part")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("name", ["clip", "llava", "paligemma"])
def test_low_rank_adapters_train_alone(name: str, work: Path, tmp_path: Path) -> None:
    options = ("trainer=villa", "trainer.modality=both", "model.lora_rank=2", "optimizer.lr=0.01")
    assert main(arguments(name, work, tmp_path / "run", *options)) == 0
    trained, before = weights(tmp_path / "run"), loaded(name, work)
    adapters = {key: value for key, value in trained.items() if "lora_" in key}
    assert any(value.any() for key, value in adapters.items() if "lora_B" in key)
    plain = {key.replace(".base_layer", ""): value for key, value in trained.items() if key not in adapters}
    assert plain.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(plain[key], value), key
    assert villa.from_pretrained(tmp_path / "run").parts.model is not None


def test_frozen_parts_stay(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("trainer=standard", "model.freeze=[model.vision_tower]", "optimizer.lr=0.01")
    assert main(arguments("llava", work, tmp_path / "run", *options)) == 0
    trained, before = weights(tmp_path / "run"), loaded("llava", work)
    changed = {key for key, value in before.items() if not torch.equal(trained[key], value)}
    assert any("language_model" in key for key in changed)
    assert any("vision_tower" in key for key in before)
    assert not any("vision_tower" in key for key in changed)
    assert main(arguments("llava", work, tmp_path / "bad", "model.freeze=[model.vison_tower]")) == 2
    assert "did you mean" in capsys.readouterr().err
