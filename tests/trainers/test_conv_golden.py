"""TRADES, AWP and SAM against tensors of their authors' code on a small convolutional network in double precision."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from golden_utils import load
from tiny import RecordingPasses, gradients
from torch import Tensor, nn
from updaters import make

from villa.adversarial.ascent import PROJECTIONS
from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.config.schema import WeightPerturbationConfig
from villa.facts import DataFacts
from villa.models.base import Model, ModelOutput, Point
from villa.trainers.base import Passes, Trainer
from villa.trainers.smart import SmartConfig, SmartTrainer
from villa.trainers.standard import StandardTrainer

CLOSE: dict[str, float] = {"rtol": 1e-9, "atol": 1e-12}


class Network(Model):
    """The network of the golden tensors, perturbed in its pixels."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(6) if "1.weight" in weights else nn.Identity()
        first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.net = nn.Sequential(first, norm, nn.ReLU(), nn.Flatten(), nn.Linear(96, 10), nn.Tanh(), nn.Linear(10, 4))
        self.double().net.load_state_dict(weights)

    @classmethod
    def from_config(cls, config: Any, facts: DataFacts) -> Model:
        raise NotImplementedError

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> ModelOutput:
        return ModelOutput(self.net(batch.pixel_values))

    def perturbation_points(self) -> Mapping[str, Point]:
        return {"image": Point("net.0", "input", layout="channels_first")}


class Given(SmartTrainer):
    """SMART from a given perturbation ``[B, 3, H, W]``."""

    start: Tensor

    def perturbations(self, passes: Passes) -> dict[str, Perturbation]:
        return {"image": Perturbation(self.config.ascent("image"), initial=rows(self.start).clone())}


def rows(pixels: Tensor) -> Tensor:
    return pixels.flatten(2).transpose(1, 2)


def batch_of(pixels: Tensor, targets: Tensor) -> Batch:
    return Batch([str(i) for i in range(len(pixels))], pixel_values=pixels, targets=targets)


def trades(case: dict[str, Any], start: Tensor, **options: Any) -> Given:
    weights = {"direction": "forward", "ascent_direction": "forward", "weight": case["opts"]["beta"], "norm": "linf"}
    trainer = Given(SmartConfig(modality="image", **weights, **options))
    trainer.start = start
    return trainer


def test_trades_has_the_released_perturbation_loss_and_gradients() -> None:
    case = load("methods", "trades")
    options, pixels = case["opts"], case["x"]

    @PROJECTIONS.register("pixels_of_trades")
    def project(delta: Tensor, radius: Any, settings: Any) -> Tensor:
        return (rows(pixels) + delta.clamp(-radius, radius)).clamp(0, 1) - rows(pixels)

    trainer = trades(
        case,
        0.001 * case["random_draws"][0],
        steps=options["perturb_steps"],
        step="sign",
        image_step_size=options["step_size"],
        image_radius=options["epsilon"],
        projection="pixels_of_trades",
        ascent_mode="eval",
    )
    model = Network(case["state_dict"]).train()
    passes = RecordingPasses(model)
    logs = trainer.step(batch_of(pixels, case["y"]), passes)
    torch.testing.assert_close(rows(pixels) + passes.used[-1]["image"], rows(case["x_adv"]), **CLOSE)  # type: ignore[arg-type]
    torch.testing.assert_close(passes.outputs[-1].logits, case["logits_adv"], **CLOSE)  # type: ignore[arg-type]
    torch.testing.assert_close(logs["loss"], case["loss"], **CLOSE)  # type: ignore[arg-type]
    mine = gradients(model)
    assert {f"net.{name}" for name in case["grads"]} == mine.keys()
    for name, gradient in case["grads"].items():
        torch.testing.assert_close(mine[f"net.{name}"], gradient, **CLOSE)  # type: ignore[arg-type]


def descent(model: Network, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    names = [name for name, _ in model.named_parameters()]
    rates = {key: options[key] for key in ("lr", "momentum", "weight_decay")}
    group = {"params": list(model.parameters()), "names": names, "initial_lr": options["lr"], "lr_multiplier": 1.0}
    return torch.optim.SGD([group], **rates)


def assert_weights(model: Network, wanted: Mapping[str, Tensor]) -> None:
    for name, weight in model.net.named_parameters():
        torch.testing.assert_close(weight.detach(), wanted[name], rtol=1e-8, atol=1e-10)


def awp(case: dict[str, Any], trainer: Trainer, pixels: Tensor) -> None:
    """An update by AWP on inputs that are perturbed already, as in the authors' scripts."""
    model = Network(case["state_dict"]).train()
    option = WeightPerturbationConfig("awp", case["opts"]["gamma"])
    updater = make(model, trainer, descent(model, case["opts"]), weight_perturbation=option)
    logs = updater.update(1, [batch_of(pixels, case["y"])])
    torch.testing.assert_close(logs["perturbed_weights_loss"], case["loss"], **CLOSE)  # type: ignore[arg-type]
    # The authors' optimiser decays the weights where they have moved to; ours where they are.
    options, wanted = case["opts"], dict(case["state_after"])
    decayed = options["lr"] * options["weight_decay"] * options["gamma"]
    assert_weights(model, wanted | {name: wanted[name] + decayed * move for name, move in case["diff"].items()})


def test_awp_ends_with_the_released_weights() -> None:
    case = load("methods", "awp")
    awp(case, StandardTrainer(), case["x_adv"])


def test_awp_around_trades_ends_with_the_released_weights() -> None:
    case = load("methods", "awp_trades")
    awp(case, trades(case, case["x_adv"] - case["x"], steps=0), case["x"])


def test_sam_ends_with_the_released_weights_after_two_updates() -> None:
    case = load("methods", "sam_conv")
    model = Network(case["state_dict"])
    option = WeightPerturbationConfig("sam", case["opts"]["rho"])
    updater = make(model, optimizer=descent(model, case["opts"]), weight_perturbation=option)
    for number, released in enumerate(case["updates"], start=1):
        logs = updater.update(number, [batch_of(case["x"], case["y"])])
        torch.testing.assert_close(logs["loss"], released["loss_1"], **CLOSE)  # type: ignore[arg-type]
        assert logs["gradient_norm"].item() == pytest.approx(
            torch.cat([g.flatten() for g in released["grads_2"].values()]).norm().item()
        )
        assert_weights(model, released["params_after"])
