"""``training.noise``: noise on the passes that a trainer leaves clean, and on no others."""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_smart import scores
from tiny import CPU, gradients, tiny_batch, tiny_model
from tiny_runs import error, log, run
from torch import Tensor

import villa.engine.passes
from villa.adversarial.ascent import AscentSettings, initialise
from villa.config.schema import CleanNoiseConfig, RunConfig, TrainingConfig
from villa.engine.passes import ModelPasses, Precision
from villa.engine.setup import build_trainer
from villa.errors import ConfigError
from villa.losses.classification import CrossEntropy
from villa.trainers.freelb import FreeLBConfig, FreeLBTrainer
from villa.trainers.pgd import FgmConfig, FgmTrainer
from villa.trainers.rdrop import RDropConfig, RDropTrainer
from villa.trainers.smart import SmartConfig, SmartTrainer
from villa.trainers.standard import StandardTrainer
from villa.trainers.villa import VillaConfig, VillaTrainer

SETTINGS = AscentSettings(0.0, None, "l2", "uniform", 5.0)


def noisy_passes(model: Any) -> ModelPasses:
    passes = ModelPasses(model, CrossEntropy(), Precision("fp32", CPU), 0, noise={"text": SETTINGS})
    passes.begin(1, 0, 1.0)
    return passes


def drawn(model: Any, passes: ModelPasses, index: int) -> Tensor:
    batch = tiny_batch()
    assert batch.attention_mask is not None
    return initialise(model.words(batch.input_ids), SETTINGS, batch.attention_mask, passes.seed(f"noise/text/{index}"))


def test_standard_training_on_noise_equals_a_loop_by_hand() -> None:
    ours, theirs, batch = tiny_model(), tiny_model(), tiny_batch()
    passes = noisy_passes(ours)
    logs = StandardTrainer().step(batch, passes)
    noise = drawn(theirs, passes, 0).detach()
    assert batch.attention_mask is not None
    bound = 5.0 / (batch.attention_mask.sum(1) * 16).sqrt()
    assert (noise.flatten(1).abs().amax(1) > 0).all()
    assert (noise.flatten(1).abs().amax(1) <= bound).all()
    assert (noise[~batch.attention_mask] == 0).all()
    loss = F.cross_entropy(scores(theirs, batch, noise), batch.targets)
    loss.backward()
    torch.testing.assert_close(logs["loss"], loss.detach(), rtol=1e-12, atol=0)
    for name, gradient in gradients(theirs).items():
        torch.testing.assert_close(gradients(ours)[name], gradient, rtol=1e-10, atol=1e-13)


#: What each pass of a step is run with: noise (N) or the trainer's own perturbation (P).
PASSES: dict[str, tuple[Any, str]] = {
    "standard": (StandardTrainer(), "N"),
    "rdrop": (RDropTrainer(RDropConfig()), "NN"),
    "villa": (VillaTrainer(VillaConfig(modality="text", steps=2)), "NPP"),
    "fgm": (FgmTrainer(FgmConfig(modality="text")), "NPP"),
    "smart": (SmartTrainer(SmartConfig(modality="text", proximal_weight=1.0)), "NNPP"),
    "steady": (SmartTrainer(SmartConfig(modality="text", ascent_mode="eval")), "-PNP"),
    "freelb": (FreeLBTrainer(FreeLBConfig(modality="text", steps=2)), "PP"),
}


@pytest.mark.parametrize("name", PASSES)
def test_noise_is_in_clean_passes_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, expected = PASSES[name]
    monkeypatch.setattr(trainer, "noisy", True)
    original, kinds = villa.engine.passes.inject, []

    @contextmanager
    def inject(model: Any, points: Any, perturbations: Any, batch: Any) -> Any:
        (perturbation,) = perturbations.values()
        kinds.append("N" if perturbation.settings is SETTINGS else "P")
        with original(model, points, perturbations, batch):
            yield

    monkeypatch.setattr(villa.engine.passes, "inject", inject)
    passes = noisy_passes(tiny_model())
    logs = trainer.step(tiny_batch(), passes)
    assert kinds == list(expected.replace("-", ""))
    forwards, *_ = trainer.cost()
    assert forwards == len(expected)
    assert logs.get("proximal", 0) == 0  # the reference has the noise of the clean pass


def test_a_noisy_clean_pass_is_not_the_first_perturbed_one() -> None:
    config = RunConfig(trainer=VillaConfig(name="villa", init="zero", dropout="shared"))
    plain: Any = build_trainer(config, tiny_model())
    config.training = TrainingConfig(noise=CleanNoiseConfig(text=5.0))
    noisy: Any = build_trainer(config, tiny_model())
    assert (plain.merged, noisy.merged) == (True, False)


def test_noise_where_there_is_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    points = {"text": model.perturbation_points()["text"]}
    monkeypatch.setattr(model, "perturbation_points", lambda: points)
    config = RunConfig(trainer=VillaConfig(name="villa", modality="text"))
    config.model = type("Named", (), {"name": "average"})()
    config.training = TrainingConfig(noise=CleanNoiseConfig(image=0.5))
    with pytest.raises(ConfigError, match=r"image is 0\.5, but model 'average' has no image that could get noise"):
        build_trainer(config, model)


def test_a_run_is_trained_on_noise_and_evaluated_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ("training.updates=1", "optimizer.lr=1e-12")
    assert run(tmp_path / "noisy", "training.noise={text: 5, image: 2}", *short) == 0
    assert run(tmp_path / "plain", *short) == 0
    noisy, plain = (log(tmp_path / name, "train")[0]["loss"] for name in ("noisy", "plain"))
    assert noisy != plain
    noisy, plain = (log(tmp_path / name, "val")[0]["loss"] for name in ("noisy", "plain"))
    assert noisy == pytest.approx(plain, rel=1e-6)
    capsys.readouterr()
    assert run(tmp_path / "wrong", "training.noise.text=-1") == 2
    assert "training.noise.text = -1.0 (command line): must be a finite number above 0" in error(
        capsys.readouterr().err
    )
