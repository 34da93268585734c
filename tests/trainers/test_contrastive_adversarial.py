"""The contrastive objective of pre-training, adversarially: gradients against loops without hooks, sums by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adversarial_oracle import assert_equals_loop, oracle
from PIL import Image
from processor_batches import make_data, tiny_folder
from replaced_modules import score, shapes
from tiny import RecordingPasses, gradients
from torch import Tensor

from villa.batch import Batch
from villa.cli.run import main
from villa.facts import DataFacts
from villa.losses.base import Loss
from villa.losses.pretraining import Pretraining, PretrainingConfig
from villa.models.base import ModelOutput
from villa.models.huggingface.config import HuggingFaceConfig
from villa.models.huggingface.model import HuggingFaceModel
from villa.trainers.freelb import FreeLBConfig, FreeLBTrainer
from villa.trainers.standard import StandardTrainer
from villa.trainers.villa import VillaConfig, VillaTrainer

STEPS: dict[str, Any] = {"steps": 3, "text_step_size": 0.05, "image_step_size": 0.1, "init": "zero"}
CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 1e-8}
#: Two texts are about the first picture, and two pictures have the third text.
LINES = ((0, "a red square"), (0, "it is red"), (1, "a blue circle"), (2, "a blue circle"), (3, "what is green"))
MATCHES = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
WEIGHT = 0.7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    noise = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(noise.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    lines = ({"text": text, "image": f"{image}.png"} for image, text in LINES)
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def build(name: str, folder: Path) -> tuple[HuggingFaceModel, Batch]:
    path = tiny_folder(name, folder)
    data = make_data(folder / "captions.jsonl", path, "contrastive")
    split = data.split("train")
    batch = data.collate([split[index] for index in range(len(LINES))])
    torch.manual_seed(0)
    model = HuggingFaceModel.from_config(HuggingFaceConfig(checkpoint=str(path)), DataFacts(task="contrastive"))
    model.load_weights(str(path))
    return model.double(), batch.map(lambda value: value.double() if value.is_floating_point() else value)


class ByHand(Loss):
    """The weighted mean over examples, pair by pair."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, output: ModelOutput, batch: Batch) -> Tensor:
        logits, count = output.logits, len(MATCHES)
        total = torch.zeros((), dtype=torch.float64)
        for i in range(count):
            texts, images = (sum(line) for line in (MATCHES[i], [row[i] for row in MATCHES]))
            for j in range(count):
                if self.form == "sigmoid":
                    sign = 1 if MATCHES[i][j] else -1
                    total = total + (1 + (-sign * logits[i, j]).exp()).log()
                    continue
                if MATCHES[i][j]:
                    total = total - (logits[i, j].exp() / logits[i].exp().sum()).log() / texts / 2
                if MATCHES[j][i]:
                    total = total - (logits[j, i].exp() / logits[:, i].exp().sum()).log() / images / 2
        return WEIGHT * total / count

    def apart(self, ours: Tensor, theirs: Tensor, reduction: str) -> Tensor:
        """Both directions of the divergence, of the distributions over texts and images or of every pair."""
        if self.form == "sigmoid":
            yes, no = ours.sigmoid() - theirs.sigmoid(), theirs.sigmoid() - ours.sigmoid()
            terms = yes * (ours.sigmoid().log() - theirs.sigmoid().log())
            return WEIGHT * (terms + no * ((1 - ours.sigmoid()).log() - (1 - theirs.sigmoid()).log())).sum() / len(ours)
        total = torch.zeros((), dtype=torch.float64)
        for dim in (0, 1):
            p, q = ours.softmax(dim), theirs.softmax(dim)
            total = total + ((p - q) * (p.log() - q.log())).sum() / 2
        return WEIGHT * total / len(ours)


def loss_of(form: Any) -> Pretraining:
    return Pretraining(PretrainingConfig(weights={"contrastive": WEIGHT}, contrastive_form=form))


def test_pairs_name_their_objective_and_what_matches(folder: Path) -> None:
    _, batch = build("clip", folder)
    assert batch.objective == "contrastive"
    assert batch.targets is not None
    assert batch.targets.tolist() == MATCHES


@pytest.mark.parametrize(
    ("name", "form", "modality"),
    [("clip", "softmax", "both"), ("clip", "softmax", "alternating"), ("siglip", "sigmoid", "both")],
)
def test_villa_and_freelb_equal_loops_without_hooks(name: str, form: str, modality: Any, folder: Path) -> None:
    model, batch = build(name, folder)
    loss, by_hand = loss_of(form), ByHand(form)
    masks, widths = shapes(model, batch, loss)
    arguments: tuple[Any, ...] = (score, by_hand, widths)
    config = VillaConfig(**STEPS, modality=modality, kl_weight=1.5)
    expected = oracle(model, batch, config, *arguments, masks=masks, apart=by_hand.apart)
    named = VillaConfig(
        **STEPS, modality=modality, kl_weight=9.0, kl_weights={"contrastive": 1.5}, objectives=["contrastive"]
    )
    passes = RecordingPasses(model, loss)
    logs = VillaTrainer(named).step(batch, passes)
    assert logs["pass2/kl"] > 0
    assert_equals_loop(model, passes, expected, modality, clean=1, unused=True, **CLOSE)

    model.zero_grad()
    plain = VillaConfig(**STEPS, modality=modality, kl_weight=0.0, clean_loss=False, average_views=True)
    expected = oracle(model, batch, plain, *arguments, masks=masks)
    passes = RecordingPasses(model, loss)
    FreeLBTrainer(FreeLBConfig(**STEPS, modality=modality, objectives=["contrastive"])).step(batch, passes)
    assert_equals_loop(model, passes, expected, modality, clean=0, unused=True, **CLOSE)


def test_a_recipe_that_perturbs_other_objectives_takes_one_clean_pass(folder: Path) -> None:
    model, batch = build("clip", folder)
    passes = RecordingPasses(model, loss_of("softmax"))
    VillaTrainer(VillaConfig(**STEPS, objectives=["mlm"])).step(batch, passes)
    mine = gradients(model)
    model.zero_grad()
    StandardTrainer().step(batch, RecordingPasses(model, ByHand("softmax")))
    assert passes.used == [{}]
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(mine[key], gradient, **CLOSE)


def run(folder: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    """Two updates of CLIP; the log."""
    path = tiny_folder("clip", folder)
    files = (f"dataset.{split}={folder / 'captions.jsonl'}" for split in ("train", "val"))
    arguments = ("model=huggingface", f"model.checkpoint={path}", "dataset=jsonl", f"dataset.processor={path}", *files)
    arguments += ("dataset.target=pair", "evaluation.metrics=[pair_retrieval]", "evaluation.monitor=pair_retrieval")
    arguments += ("batch.examples=5", "training.updates=2", "run_type=train", "logging.every=1", "device=cpu")
    arguments += (
        "logging.tensorboard=false",
        "logging.figures=false",
        "logging.progress=off",
        f"output_dir={output}",
        "optimizer.lr=0.01",
    )
    assert main([*arguments, *more]) == 0
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_the_loss_of_pre_training_is_the_contrastive_one_on_pairs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    villa = ("trainer=villa", "trainer.modality=both", "trainer.steps=2")
    own = run(folder, tmp_path / "own", "loss=contrastive", *villa)
    assert "3 forward + 3 backward a micro-batch, 3.0x standard training" in capsys.readouterr().out
    dispatched = run(folder, tmp_path / "run", "loss=pretraining", *villa, "trainer.objectives=[contrastive]")
    assert dispatched == own
    assert "3.0x standard training" in capsys.readouterr().out
    clean = run(folder, tmp_path / "clean", "loss=pretraining", *villa, "trainer.objectives=[itm]")
    assert "1 forward + 1 backward a micro-batch, 1.0x standard training" in capsys.readouterr().out
    assert not any("pass0" in name for record in clean for name in record)
    assert all(math.isfinite(record["loss"]) for record in clean if "loss" in record)
