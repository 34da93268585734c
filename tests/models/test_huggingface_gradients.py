"""A dozen architectures of transformers: their gradients equal those of a loop without hooks, in double precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adversarial_oracle import oracle
from processor_batches import ANSWERS, GENERATIVE, make_batch, tiny, tiny_folder, write_questions
from replaced_modules import score, shapes
from tiny import RecordingPasses

from villa.batch import Batch
from villa.facts import DataFacts, Task
from villa.losses.base import Loss
from villa.losses.classification import CrossEntropy
from villa.models.huggingface.config import HuggingFaceConfig
from villa.models.huggingface.model import HuggingFaceModel
from villa.trainers.freelb import FreeLBConfig, FreeLBTrainer
from villa.trainers.standard import StandardTrainer
from villa.trainers.villa import VillaConfig, VillaTrainer

DUAL = ("clip", "siglip", "blip")
CASES: list[tuple[str, Task]] = [
    *((name, "contrastive") for name in DUAL),
    *((name, "generation") for name in GENERATIVE),
    *((name, "classification") for name in ("clip", "vilt", "bridgetower", "flava", "llava")),
]
STEPS: dict[str, Any] = {"steps": 3, "text_step_size": 0.05, "image_step_size": 0.1, "init": "zero"}
#: Language models normalise and rotate in fp32 whatever the type of their weights.
CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 1e-7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def build(name: str, task: Task, folder: Path) -> tuple[HuggingFaceModel, Batch]:
    torch.manual_seed(0)
    path = tiny_folder(name, folder)
    questions = folder / "questions.jsonl"
    batch = make_batch(path, task, questions if questions.exists() else write_questions(folder))
    if task == "contrastive":  # the loss of the loop compares classes
        batch = replace(batch, targets=torch.arange(len(batch)))
    facts = DataFacts(num_labels=len(ANSWERS) if task == "classification" else None, task=task)
    model = HuggingFaceModel.from_config(HuggingFaceConfig(checkpoint=str(path)), facts)
    model.load_weights(str(path))
    return model.double(), batch.map(lambda value: value.double() if value.is_floating_point() else value)


def compare(model: HuggingFaceModel, passes: RecordingPasses, expected: tuple[Any, Any], first: int) -> None:
    gradients, used = expected
    mine = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {n for n, g in gradients.items() if g.abs().sum() > 0} <= mine.keys()
    for name, gradient in mine.items():
        expected_gradient = gradients.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected_gradient, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    for t, step in enumerate(used):
        for modality, delta in step.items():
            torch.testing.assert_close(passes.used[first + t][modality], delta, **CLOSE)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_gradients_equal_a_loop_without_hooks(name: str, task: Task, folder: Path) -> None:
    """Standard training, FreeLB and VILLA, both modalities perturbed; the perturbation moves, and not on padding."""
    loss: Loss = CrossEntropy()
    model, batch = build(name, task, folder)
    masks, widths = shapes(model, batch, loss)
    config = VillaConfig(**STEPS, modality="both", kl_weight=1.5)
    expected = oracle(model, batch, config, score, loss, widths, masks=masks)
    passes = RecordingPasses(model, loss)
    logs = VillaTrainer(config).step(batch, passes)
    assert all(value.isfinite() for value in logs.values())
    compare(model, passes, expected, 1)
    for modality, delta in passes.used[-1].items():
        assert (delta.norm(dim=-1) > 0)[masks[modality]].any()
        assert (delta[~masks[modality]] == 0).all()

    model.zero_grad()
    plain = VillaConfig(**STEPS, modality="both", kl_weight=0.0, clean_loss=False, average_views=True)
    expected = oracle(model, batch, plain, score, loss, widths, masks=masks)
    passes = RecordingPasses(model, loss)
    FreeLBTrainer(FreeLBConfig(**STEPS, modality="both")).step(batch, passes)
    compare(model, passes, expected, 0)

    model.zero_grad()
    StandardTrainer().step(batch, RecordingPasses(model, loss))
    standard = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss(model(batch), batch).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(standard[parameter_name], parameter.grad)


def test_more_than_a_dozen_architectures_are_here() -> None:
    assert {name for name, _ in CASES} == set(tiny.ARCHITECTURES)
    assert len(tiny.ARCHITECTURES) >= 14
