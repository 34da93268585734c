"""NaN and infinity: named with the update, the pass and the examples, and skipped or stopped at."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from shapes.model import AverageModel
from tiny import tiny_batch, tiny_model
from tiny_runs import error, log, run
from torch import Tensor
from updaters import adamw, cut, make, set_scale

from villa.batch import Batch
from villa.config.schema import WeightPerturbationConfig
from villa.engine.frame import describe_nonfinite
from villa.engine.passes import ModelPasses
from villa.engine.updater import Updater
from villa.errors import NonFiniteError
from villa.losses.base import Loss, LossConfig
from villa.losses.classification import CrossEntropy
from villa.models.base import ModelOutput
from villa.registry import register_loss
from villa.trainers.freelb import FreeLBConfig, FreeLBTrainer
from villa.trainers.noise import NoiseConfig, NoiseTrainer
from villa.trainers.pgd import FgmConfig, FgmTrainer, PgdConfig, PgdTrainer
from villa.trainers.smart import SmartConfig, SmartTrainer
from villa.trainers.villa import VillaConfig, VillaTrainer


@dataclass
class PoisonedConfig(LossConfig):
    """Options: the ids of the examples whose loss is NaN; all of them without any."""

    ids: list[str] = field(default_factory=list)


@register_loss("poisoned")
class Poisoned(CrossEntropy):
    """Cross-entropy that is NaN for some examples; it leaves evaluation alone."""

    Config = PoisonedConfig
    config: PoisonedConfig

    def forward(self, output: ModelOutput, batch: Batch) -> Tensor:
        bad = not self.config.ids or {*batch.ids} & {*self.config.ids}
        loss = super().forward(output, batch)
        return loss * float("nan") if bad and torch.is_grad_enabled() else loss


class NthIsInfinite(CrossEntropy):
    """Cross-entropy whose n-th value is infinite."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def forward(self, output: ModelOutput, batch: Batch) -> Tensor:
        self.left -= 1
        return super().forward(output, batch) * (1.0 if self.left else float("inf"))


class RootOfZero(AverageModel):
    """Its outputs are finite, but the gradient of its word embeddings is not."""

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> ModelOutput:
        output = super().forward(batch)
        return ModelOutput(output.logits + (self.words.weight * 0).sum().sqrt())


def updater(loss: Loss, trainer: Any = None, **training: Any) -> Updater:
    model = tiny_model()
    return make(model, trainer, adamw(model), loss=loss, **training)


def test_a_loss_is_named_with_update_pass_and_the_examples_of_its_micro_batch() -> None:
    stopped = updater(Poisoned(PoisonedConfig(ids=["4"])))
    with pytest.raises(NonFiniteError) as caught:
        stopped.update(7, cut(tiny_batch(), (4, 2)))
    assert str(caught.value) == (
        "update 7: the loss of backward pass 1 is nan (not finite: loss); examples: 4, 5; "
        "lower the learning rate or step sizes, or set training.nonfinite=skip"
    )


@pytest.mark.parametrize(
    ("trainer", "n", "message"),
    [
        (FreeLBTrainer(FreeLBConfig()), 2, "backward pass 2 is inf (not finite: loss, pass1/loss"),
        (FreeLBTrainer(FreeLBConfig()), 6, "backward pass 3 is inf (not finite: loss, pass2/loss); examples: 4, 5;"),
        (VillaTrainer(VillaConfig(clean_loss=False)), 4, "backward pass 3 is inf (not finite: loss, pass1/loss"),
    ],
)
def test_the_pass_of_an_adversarial_method_is_named(trainer: Any, n: int, message: str) -> None:
    with pytest.raises(NonFiniteError) as caught:
        updater(NthIsInfinite(n), trainer).update(1, cut(tiny_batch(), (4, 2)))
    assert message in str(caught.value)


def root_of_zero() -> RootOfZero:
    model = tiny_model()
    model.__class__ = RootOfZero
    assert isinstance(model, RootOfZero)
    return model


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gradient_is_named_by_its_parameter(precision: str) -> None:
    model = root_of_zero().float()
    made = make(model, precision=precision)
    if precision == "fp16":  # at a scale of 1 it is no overflow that the scaler could mend
        set_scale(made, 1.0)
    with pytest.raises(NonFiniteError) as caught:
        made.update(2, cut(tiny_batch(dtype=torch.float32), (4, 2)))
    assert "update 2: the gradient of words.weight is not finite; examples: 0, 1, 2, 3, 4, 5;" in str(caught.value)


def test_a_norm_that_overflows_is_said_to_although_every_gradient_is_finite() -> None:
    model = tiny_model(torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e38)
    found = describe_nonfinite([(0, torch.tensor(1.0))], {}, model.named_parameters(), [tiny_batch(examples=2)])
    assert found == "the norm of all gradients together is too large for a float; examples: 0, 1"


class Astray(ModelPasses):
    """Passes in which all that is perturbed has a gradient that is NaN, where example 4 is; losses are finite."""

    def forward(self, batch: Batch, perturbations: Any = None, **named: Any) -> ModelOutput:
        output = super().forward(batch, perturbations, **named)
        if not perturbations or "4" not in batch.ids:
            return output
        return output.map_scores(lambda scores: scores + (scores - scores.detach()).abs().sum().sqrt())


PERTURBING: dict[str, Any] = {
    "fgm": FgmTrainer(FgmConfig()),
    "pgd": PgdTrainer(PgdConfig(modality="alternating")),
    "smart": SmartTrainer(SmartConfig()),
    "noise": NoiseTrainer(NoiseConfig()),
    "freelb": FreeLBTrainer(FreeLBConfig()),
    "villa": VillaTrainer(VillaConfig()),
}


@pytest.mark.parametrize("option", [{}, {"weight_perturbation": WeightPerturbationConfig("sam", 0.1)}])
@pytest.mark.parametrize("name", PERTURBING)
def test_an_update_whose_perturbations_go_astray_is_trained_without_them(
    name: str, option: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    made, plain = (
        updater(CrossEntropy(), PERTURBING[name], nonfinite="skip", **option),
        updater(CrossEntropy(), **option),
    )
    made.passes.__class__ = Astray
    for each in (made, plain):
        logs = each.update(1, cut(tiny_batch(), (4, 2)))
        assert logs["loss"].isfinite()
    torch.testing.assert_close(made.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)
    searches = name in ("pgd", "smart")
    found = "the gradient of a perturbation (text) is not finite; examples: 4, 5" if searches else "the gradient of "
    assert f"trained on clean inputs alone in update 1: {found}" in capsys.readouterr().out
    assert made.skipped == 1
    made.update(2, cut(tiny_batch(start=6), (4, 2)))
    assert made.skipped == 0
    assert not capsys.readouterr().out
    stopped = updater(CrossEntropy(), PERTURBING[name], **option)
    stopped.passes.__class__ = Astray
    with pytest.raises(NonFiniteError, match=r"is not finite; examples: .*4, 5"):
        stopped.update(1, cut(tiny_batch(), (4, 2)))


def test_too_many_updates_without_perturbations_end_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    made = updater(CrossEntropy(), PERTURBING["pgd"], nonfinite="skip", max_skips=2)
    made.passes.__class__ = Astray
    for number in (1, 2):
        made.update(number, [tiny_batch()])
    with pytest.raises(NonFiniteError, match="the 2 updates before it were trained on clean inputs alone"):
        made.update(3, [tiny_batch()])


def test_an_update_that_is_not_finite_on_clean_inputs_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    made = updater(Poisoned(PoisonedConfig(ids=["4"])), PERTURBING["villa"], nonfinite="skip")
    weights = copy.deepcopy(made.model.state_dict())
    made.update(1, [tiny_batch()])
    assert capsys.readouterr().out.startswith("skipped update 1: the loss of backward pass 1 is nan")
    torch.testing.assert_close(made.model.state_dict(), weights, rtol=0, atol=0)


def test_skipping_leaves_weights_and_optimizer_untouched_and_goes_on() -> None:
    made = updater(Poisoned(PoisonedConfig(ids=["7"])), nonfinite="skip")
    made.update(1, [tiny_batch()])
    weights, state = copy.deepcopy(made.model.state_dict()), copy.deepcopy(made.optimizer.state_dict()["state"])
    logs = made.update(2, [tiny_batch(start=6)])
    assert logs["loss"].isnan()
    assert made.skipped == 1
    torch.testing.assert_close(made.model.state_dict(), weights, rtol=0, atol=0)
    torch.testing.assert_close(made.optimizer.state_dict()["state"], state, rtol=0, atol=0)
    made.update(3, [tiny_batch(start=12)])
    assert made.skipped == 0
    without = updater(CrossEntropy())
    without.update(1, [tiny_batch()])
    without.update(3, [tiny_batch(start=12)])
    torch.testing.assert_close(made.model.state_dict(), without.model.state_dict(), rtol=0, atol=0)


def test_a_run_stops_in_one_line_and_may_be_started_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "out", "loss=poisoned", "trainer=freelb") == 2
    text = error(capsys.readouterr().err)
    assert "update 1: the loss of backward pass 1 is nan (not finite: loss, pass0/loss" in text
    assert text.count(", ") > 8  # the examples
    assert not (tmp_path / "out").exists()
    assert run(tmp_path / "out") == 0


def test_a_run_skips_and_logs_what_it_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "out", "loss=poisoned", "loss.ids=['3']", "training.nonfinite=skip") == 0
    output = capsys.readouterr().out
    assert output.count("skipped update") == 1
    assert sum(record["loss"] == "nan" for record in log(tmp_path / "out", "train")) == 1


def test_max_skips_in_a_row_end_a_run_and_their_count_survives_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison = ("loss=poisoned", "training.nonfinite=skip", "training.max_skips=5")
    assert run(tmp_path / "out", *poison, "training.updates=3") == 0
    capsys.readouterr()
    assert run(tmp_path / "out", *poison, "training.updates=9", "checkpoint.resume=true") == 2
    text = error(capsys.readouterr().err)
    assert "update 6: the loss of backward pass 1 is nan" in text
    assert "the 5 updates before it were skipped already (training.max_skips)" in text
