"""SMART's proximal term: the divergence from a running average of the weights, against a loop by hand."""

import copy
from typing import Any

import pytest
import torch
from test_every_method import divergence
from tiny import RecordingPasses, gradients, tiny_batch, tiny_model
from torch import Tensor
from updaters import adamw, cut, make

from villa.batch import Batch
from villa.config.schema import WeightPerturbationConfig
from villa.engine.updater import Updater
from villa.errors import ConfigError
from villa.losses.classification import CrossEntropy
from villa.models.base import Model
from villa.trainers.smart import SmartConfig, SmartTrainer

#: No ascent and no noise: beside the proximal term, a term that is zero.
STILL: dict[str, Any] = {"steps": 0, "init_scale": 0.0, "modality": "both"}


def proximal(model: Model, average: Model, batch: Batch, weight: float) -> Tensor:
    loss: Tensor = CrossEntropy()(model(batch), batch)
    return loss + weight * divergence(model(batch).logits, average(batch).logits.detach(), "symmetric")


def test_updates_are_those_of_a_loop_by_hand_and_so_is_the_average() -> None:
    config = SmartConfig(**STILL, proximal_weight=3.0, proximal_decay=0.6, proximal_late_decay=0.9)
    ours, theirs, average = tiny_model(), tiny_model(), tiny_model()
    trainer = SmartTrainer(config)
    updater, optimizer = make(ours, trainer, adamw(ours)), adamw(theirs)  # of 10 updates
    for number in (1, 2, 3):
        batch = tiny_batch(start=6 * number)
        logs = updater.update(number, cut(batch, (4, 2)))
        assert (logs["proximal"] > 1e-9) == (number > 1)
        optimizer.zero_grad()
        proximal(theirs, average, batch, 3.0).backward()
        optimizer.step()
        decay = 0.6 if number == 1 else 0.9  # the first tenth
        with torch.no_grad():
            for name, weight in theirs.named_parameters():
                kept = average.get_parameter(name)
                kept.copy_(decay * kept + (1 - decay) * weight)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-9, atol=1e-11)
    kept = trainer.weight_state["reference_average"]
    torch.testing.assert_close(kept, dict(average.named_parameters()), rtol=1e-9, atol=1e-11, check_dtype=False)


def test_at_the_average_itself_the_term_and_its_gradient_are_zero() -> None:
    found = []
    for weight in (0.0, 5.0):
        model = tiny_model()
        logs = SmartTrainer(SmartConfig(proximal_weight=weight)).step(tiny_batch(), RecordingPasses(model))
        assert logs.get("proximal", torch.zeros(())) == 0
        found.append(gradients(model))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-15)


def state(updater: Updater) -> dict[str, Any]:
    return copy.deepcopy({"model": dict(updater.model.state_dict()), "updater": updater.state_dict()})


def numbers(updater: Updater) -> dict[str, Any]:
    """The state without names and texts, which comparisons of tensors do not take."""
    found = state(updater)
    found["updater"]["optimizer"] = found["updater"]["optimizer"]["state"]
    return found


@pytest.mark.parametrize("option", [{}, {"weight_perturbation": WeightPerturbationConfig("sam", 0.1)}, {"ema": 0.9}])
def test_a_resumed_run_goes_on_to_the_bit(option: dict[str, Any]) -> None:
    def new() -> Updater:
        model = tiny_model()
        trainer = SmartTrainer(SmartConfig(proximal_weight=1.0, proximal_decay=0.5))
        return make(model, trainer, adamw(model), **option)

    straight, first, second = new(), new(), new()
    for number in (1, 2, 3, 4):
        straight.update(number, cut(tiny_batch(start=6 * number), (4, 2)))
        (first if number < 3 else second).update(number, cut(tiny_batch(start=6 * number), (4, 2)))
        if number == 2:
            saved = state(first)
            second.model.load_state_dict(saved["model"])
            second.load_state_dict(saved["updater"])
    torch.testing.assert_close(numbers(second), numbers(straight), rtol=0, atol=0)
    assert (
        state(second)["updater"]["trainer"]["weights"]["reference_average"].keys()
        == dict(straight.model.named_parameters()).keys()
    )


def test_without_the_term_no_average_is_kept() -> None:
    model = tiny_model()
    updater = make(model, SmartTrainer(SmartConfig()), adamw(model))
    updater.update(1, [tiny_batch()])
    assert updater.state_dict()["trainer"] == {"state": {}, "weights": {}}
    assert "average" not in updater.state_dict()


def test_an_average_that_nothing_asks_for_any_more_is_dropped() -> None:
    model = tiny_model()
    updater = make(model, SmartTrainer(SmartConfig(proximal_weight=1.0)), adamw(model))
    updater.update(1, [tiny_batch()])
    without = make(model, SmartTrainer(SmartConfig()), adamw(model))
    without.load_state_dict(updater.state_dict())
    assert without.state_dict()["trainer"]["weights"] == {}


@pytest.mark.parametrize("options", [{"proximal_weight": -1.0}, {"proximal_decay": 1.0}, {"proximal_late_decay": -0.1}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is"):
        SmartConfig(**options).check()
