"""Attacks on models of other kinds: a fusion encoder, a dual encoder that classifies, and one that generates."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processor_batches import ANSWERS, make_batch, tiny_folder, write_questions
from tiny import CPU

from villa.analysis.robustness import VIEWS, Case, attack
from villa.analysis.victim import Measure, Victim
from villa.config.schema import RobustnessConfig
from villa.datasets.names import pixel_scale
from villa.datasets.own.processors import load_processor
from villa.engine.passes import ModelPasses, Precision
from villa.evaluation.metrics import Accuracy, ExactMatch
from villa.facts import DataFacts, Task
from villa.losses.classification import CrossEntropy, LanguageModel
from villa.models.huggingface.config import HuggingFaceConfig
from villa.models.huggingface.model import HuggingFaceModel


@pytest.mark.parametrize(
    ("name", "task"), [("vilt", "classification"), ("clip", "classification"), ("llava", "generation")]
)
def test_a_small_ball_raises_the_loss_and_a_large_one_takes_all(name: str, task: Task, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tiny_folder(name, tmp_path)
    batch = make_batch(path, task, write_questions(tmp_path))
    facts = DataFacts(num_labels=len(ANSWERS) if task == "classification" else None, task=task)
    model = HuggingFaceModel.from_config(HuggingFaceConfig(checkpoint=str(path)), facts)
    model.load_weights(str(path))
    generates = task == "generation"
    loss = LanguageModel() if generates else CrossEntropy()
    passes = ModelPasses(model, loss, Precision("fp32", CPU), 0)
    with torch.inference_mode():  # what the model says is right
        said = passes.forward(batch, grad=False, train=False).logits.argmax(-1)
    batch = replace(batch, targets=said.clone())
    measure = Measure(loss, ExactMatch() if generates else Accuracy())
    clean, scores = Victim(passes, batch, measure, list(range(len(batch)))).clean()
    assert scores.tolist() == [1.0] * len(batch)
    modality = next(name for name in ("both", "image", "text") if set(VIEWS[name]) <= set(passes.points))
    case = Case(modality, "pgd", "task", (0.05, 20.0), 10, 0)
    found = attack(case, RobustnessConfig(), batch, lambda: Victim(passes, batch, measure, list(range(len(batch)))))
    assert all(one.losses[0] > before for one, before in zip(found, clean.tolist(), strict=True))
    assert [one.scores[1] for one in found] == [0.0] * len(batch)
    assert not any(one.flat for one in found)
    slope = case._replace(attack="finite_difference", radii=(0.05,))
    told = attack(slope, RobustnessConfig(), batch, lambda: Victim(passes, batch, measure, list(range(len(batch)))))
    assert all(one.slope_error is not None and one.slope_error < 0.1 for one in told)


@pytest.mark.parametrize("name", ["vilt", "clip"])
def test_adversarial_images_are_within_the_radius_and_of_eight_bits(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tiny_folder(name, tmp_path)
    batch = make_batch(path, "classification", write_questions(tmp_path))
    scale = pixel_scale(load_processor(str(path)))
    model = HuggingFaceModel.from_config(
        HuggingFaceConfig(checkpoint=str(path)),
        DataFacts(num_labels=len(ANSWERS), task="classification", pixels=scale),
    )
    model.load_weights(str(path))
    passes = ModelPasses(model, CrossEntropy(), Precision("fp32", CPU), 0)
    with torch.inference_mode():
        said = passes.forward(batch, grad=False, train=False).logits.argmax(-1)
    batch = replace(batch, targets=said.clone())
    seen: list[torch.Tensor] = []
    point = model.other_points()["image.pixels"]

    def look(_: torch.nn.Module, given: tuple[torch.Tensor, ...], __: torch.Tensor) -> None:
        seen.append(given[0].detach())  # as the perturbation has left it

    handle = model.get_submodule(point.module).register_forward_hook(look)
    victims: list[Victim] = []

    def make() -> Victim:
        victims.append(Victim(passes, batch, Measure(CrossEntropy(), Accuracy()), list(range(len(batch)))))
        return victims[-1]

    config = RobustnessConfig(norm="linf", points={"image": "pixels"})
    found = attack(Case("image", "pgd", "task", (4 / 255, 0.5), 8, 0), config, batch, make)
    handle.remove()
    assert point.scale is not None
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (point.scale.mean, point.scale.std))
    images = [values * std + mean for values in seen]
    last = images[-1] * 255
    real = torch.ones_like(last, dtype=torch.bool)
    if batch.inputs and "pixel_mask" in batch.inputs:
        real = (batch.inputs["pixel_mask"] > 0).unsqueeze(1).expand_as(last)
    torch.testing.assert_close(last[real], last[real].round(), rtol=0, atol=1e-3)
    for victim, radius in zip(victims, (4 / 255, 0.5), strict=True):
        assert victim.kept["image.pixels"].abs().max() <= radius + 1e-6
    assert images[-1].min() >= -1e-5
    assert images[-1].max() <= 1 + 1e-5
    assert sum(one.scores[1] for one in found) < len(batch)
