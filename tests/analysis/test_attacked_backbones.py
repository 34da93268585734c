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
