"""A dozen architectures of transformers: their gradients equal those of a loop without hooks, in double precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adversarial_oracle import oracle
from processor_batches import ANSWERS, GENERATIVE, make_batch, tiny, tiny_folder, write_questions
from tiny import RecordingPasses
from torch import Tensor, nn

from villa.batch import Batch
from villa.losses.base import Loss
from villa.losses.classification import CrossEntropy
from villa.models.base import DataFacts, Task
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


class Plus(nn.Module):
    """A module with something added to its output, or to one of its keyword arguments."""

    def __init__(self, inner: nn.Module, delta: Tensor, argument: str | None) -> None:
        super().__init__()
        self.inner, self.delta, self.argument = inner, delta, argument

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *values: Any, **named: Any) -> Any:
        if self.argument is not None:
            return self.inner(*values, **named | {self.argument: named[self.argument] + self.delta})
        value = self.inner(*values, **named)
        return value + (self.delta.transpose(1, 2).reshape(value.shape) if value.dim() > 3 else self.delta)


def score(model: HuggingFaceModel, batch: Batch, **deltas: Tensor) -> Tensor:
    """The logits of the model with other modules in place of those that are perturbed."""
    points = model.perturbation_points()
    # The inner module first: the word embedding may lie below the language model.
    places = sorted(deltas, key=lambda modality: -points[modality].module.count("."))
    originals = {}
    for modality in places:
        parent, _, child = points[modality].module.rpartition(".")
        originals[modality] = model.get_submodule(points[modality].module)
        setattr(
            model.get_submodule(parent), child, Plus(originals[modality], deltas[modality], points[modality].argument)
        )
    try:
        return model(batch).logits
    finally:
        for modality in reversed(places):
            parent, _, child = points[modality].module.rpartition(".")
            setattr(model.get_submodule(parent), child, originals[modality])


def shapes(model: HuggingFaceModel, batch: Batch) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Where each modality may be perturbed, and the width there."""
    passes = RecordingPasses(model, CrossEntropy())
    VillaTrainer(VillaConfig(**STEPS | {"steps": 1}, modality="both")).step(batch, passes)
    model.zero_grad()
    deltas = passes.used[-1]
    masks = {}
    for modality, point in model.perturbation_points().items():
        mask = point.mask(batch)
        masks[modality] = torch.ones(deltas[modality].shape[:2], dtype=torch.bool) if mask is None else mask
    return masks, {modality: delta.shape[2] for modality, delta in deltas.items()}


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
    masks, widths = shapes(model, batch)
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
