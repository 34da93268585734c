"""The frame of an update: methods that act on weights around the micro-batches, whatever happens in between."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shapes.model import AverageModel
from shapes.weights import AverageConfig, AveragingTrainer, SamConfig, SamTrainer
from strangers import AwpStandard
from tiny import gradients, tiny_batch, tiny_model
from torch import Tensor, nn
from updaters import adamw, cut, make, set_scale

from villa.batch import Batch
from villa.config.schema import WeightPerturbationConfig
from villa.engine.updater import Updater
from villa.errors import ConfigError, NonFiniteError
from villa.losses.classification import CrossEntropy
from villa.models.base import ModelOutput
from villa.signals import Interrupted
from villa.trainers.base import Frame, Logs
from villa.trainers.standard import StandardTrainer
from villa.trainers.villa import VillaConfig, VillaTrainer

SIZES = (4, 2)


def slopes(model: AverageModel, batch: Batch) -> dict[str, Tensor]:
    """Gradients of the mean cross-entropy of an update, by hand."""
    copied = copy.deepcopy(model)
    copied.zero_grad()
    F.cross_entropy(copied(batch).logits, batch.targets).backward()
    return gradients(copied)


def sam(model: AverageModel, batch: Batch) -> dict[str, Tensor]:
    """The gradients of SAM with rho 0.5."""
    up = slopes(model, batch)
    norm = torch.cat([slope.flatten() for slope in up.values()]).norm()
    above = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in above.named_parameters():
            parameter.add_(0.5 * up[name] / norm)
    return slopes(above, batch)


def awp(model: AverageModel, batch: Batch) -> dict[str, Tensor]:
    """The gradients of AWP with gamma 0.01."""
    up = slopes(model, batch)
    above = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in above.named_parameters():
            parameter.add_(AwpStandard.gamma * parameter.norm() * up[name] / up[name].norm())
    return slopes(above, batch)


@pytest.mark.parametrize(
    ("trainer", "by_hand"), [(SamTrainer(SamConfig(rho=0.5)), sam), (AwpStandard(), awp)], ids=["sam", "awp"]
)
def test_a_method_that_moves_weights_equals_a_loop_by_hand(
    trainer: Any, by_hand: Callable[[AverageModel, Batch], dict[str, Tensor]]
) -> None:
    ours, theirs = tiny_model(), tiny_model()
    updater = make(ours, trainer, adamw(ours))
    optimizer = adamw(theirs)
    for number in (1, 2, 3):
        batch = tiny_batch(start=6 * number)
        updater.update(number, cut(batch, SIZES))
        for name, gradient in by_hand(theirs, batch).items():
            theirs.get_parameter(name).grad = gradient
        optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-9, atol=1e-12)
    plain = tiny_model()
    other = make(plain, optimizer=adamw(plain))
    other.update(1, cut(tiny_batch(start=6), SIZES))
    assert not ours.state_dict()["words.weight"].equal(plain.state_dict()["words.weight"])


def of_option(model: AverageModel, batch: Batch, name: str, radius: float, adaptive: bool) -> dict[str, Tensor]:
    """The gradients at moved weights: SAM, its adaptive form, or AWP on matrices alone."""
    up, weights = slopes(model, batch), dict(model.named_parameters())
    moves = {n: weights[n] ** 2 * slope if adaptive else slope for n, slope in up.items()}
    norm = torch.cat([(weights[n].abs() * up[n] if adaptive else up[n]).flatten() for n in up]).norm()
    if name == "awp":
        moves = {n: weights[n].norm() * slope / slope.norm() for n, slope in up.items() if slope.dim() > 1}
    above = copy.deepcopy(model)
    with torch.no_grad():
        for n, move in moves.items():
            above.get_parameter(n).add_(radius * move / (1.0 if name == "awp" else norm))
    return slopes(above, batch)


@pytest.mark.parametrize(
    ("name", "radius", "adaptive"), [("sam", 0.5, False), ("sam", 2.0, True), ("awp", 0.05, False)]
)
def test_perturbed_weights_as_an_option_equal_a_loop_by_hand(name: Any, radius: float, adaptive: bool) -> None:
    ours, theirs = tiny_model(), tiny_model()
    option = WeightPerturbationConfig(name, radius, adaptive, after=1)
    updater = make(ours, optimizer=adamw(ours), weight_perturbation=option)
    optimizer = adamw(theirs)
    for number in (1, 2, 3):
        batch = tiny_batch(start=6 * number)
        logs = updater.update(number, cut(batch, SIZES))
        assert ("perturbed_weights_loss" in logs) == (number > 1)
        plain = slopes(theirs, batch) if number == 1 else of_option(theirs, batch, name, radius, adaptive)
        for parameter, gradient in plain.items():
            theirs.get_parameter(parameter).grad = gradient
        optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-9, atol=1e-12)


def test_perturbed_weights_go_around_any_method_that_has_no_update_of_its_own() -> None:
    model = tiny_model()
    option = WeightPerturbationConfig("sam", 0.1)
    logs = make(model, VillaTrainer(VillaConfig()), adamw(model), weight_perturbation=option).update(1, [tiny_batch()])
    assert logs["perturbed_weights_loss"] > logs["loss"]
    with pytest.raises(ConfigError, match="acts on the weights itself; set it to none"):
        make(model, SamTrainer(SamConfig()), weight_perturbation=option)


def test_an_average_of_weights_equals_one_by_hand() -> None:
    model = tiny_model()
    trainer = AveragingTrainer(AverageConfig(decay=0.15))
    updater = make(model, trainer)
    expected: dict[str, Tensor] = {}
    for number, decay in ((1, 0.1), (2, 0.15), (3, 0.15)):  # in the first one, (1 + 0) / (10 + 0)
        updater.update(number, cut(tiny_batch(start=6 * number), SIZES))
        for name, weight in model.state_dict().items():
            before = expected.get(name, weight)
            expected[name] = decay * before + (1 - decay) * weight
    torch.testing.assert_close(trainer.weight_state["average"], expected, rtol=1e-12, atol=1e-14)
    assert trainer.state_dict() == {"seen": 3}


class Counting(SamTrainer):
    """SAM that counts its micro-batches, in a model with a running mean."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.count = torch.zeros((), dtype=torch.int64)

    def step(self, batch: Batch, passes: Any) -> Logs:
        self.count += 1
        return super().step(batch, passes)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Any) -> None:
        self.count = state["count"]


def with_running_mean() -> AverageModel:
    model = tiny_model()
    model.head.insert(1, nn.BatchNorm1d(64).double())
    return model


def everything(updater: Updater) -> dict[str, Any]:
    """All that an update may change."""
    state = updater.state_dict()
    rates = [group["lr"] for group in state["optimizer"]["param_groups"]]
    kept = {"moments": state["optimizer"]["state"], "rates": rates, "skipped": state["skipped"]}
    return copy.deepcopy({"weights": dict(updater.model.state_dict()), "trainer": state["trainer"], **kept})


@pytest.mark.parametrize("at", range(1, 7))
def test_a_signal_anywhere_leaves_everything_as_it_was(at: int) -> None:
    """Two micro-batches twice; before each pass, and between them, it is looked for signals."""
    model = with_running_mean()
    updater = make(model, Counting(SamConfig(rho=0.5)), adamw(model))
    parts, later = cut(tiny_batch(), SIZES), cut(tiny_batch(start=6), SIZES)
    updater.update(1, parts)
    before, calls = everything(updater), 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Interrupted(15)

    with pytest.raises(Interrupted):
        updater.update(2, later, check=check)
    torch.testing.assert_close(everything(updater), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    updater.update(2, later)
    straight_model = with_running_mean()
    straight = make(straight_model, Counting(SamConfig(rho=0.5)), adamw(straight_model))
    for number, given in ((1, parts), (2, later)):
        straight.update(number, given)
    torch.testing.assert_close(everything(updater), everything(straight), rtol=0, atol=0)
    assert everything(updater)["trainer"]["state"]["count"] == 8


def test_moved_weights_and_running_means_are_put_back_to_the_bit() -> None:
    seen: list[dict[str, Tensor]] = []

    class Moving(StandardTrainer):
        def update(self, frame: Frame) -> Logs:
            before = copy.deepcopy(model.state_dict())
            with frame.moved({name: torch.full_like(w, 0.1) for name, w in frame.weights.items()}):
                seen.append(copy.deepcopy(model.state_dict()))
                frame.accumulate()
            torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
            with pytest.raises(ZeroDivisionError), frame.moved({"words.weight": torch.ones(5, 16)}):
                1 / 0  # noqa: B018 - an error in a method
            torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
            return super().update(frame)

    model = with_running_mean()
    before = copy.deepcopy(model.state_dict())
    make(model, Moving()).update(1, [tiny_batch()])
    torch.testing.assert_close(seen[0]["words.weight"], before["words.weight"] + 0.1)


class InfiniteAbove(CrossEntropy):
    """Cross-entropy that is infinite in the ``at``-th pass."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def forward(self, output: ModelOutput, batch: Batch) -> Tensor:
        self.left -= 1
        return super().forward(output, batch) * (1.0 if self.left else float("inf"))


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_skipped_update_leaves_everything_as_it_was(at: int) -> None:
    model = with_running_mean()
    updater = make(model, Counting(SamConfig(rho=0.5)), adamw(model), loss=InfiniteAbove(at), nonfinite="skip")
    before = everything(updater)
    updater.update(1, cut(tiny_batch(), SIZES))
    after = everything(updater)
    assert (before.pop("skipped"), after.pop("skipped")) == (0, 1)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    updater.update(2, cut(tiny_batch(), SIZES))
    assert updater.skipped == 0
    assert updater.optimizer.state
    stopped = make(with_running_mean(), SamTrainer(SamConfig()), loss=InfiniteAbove(at))
    with pytest.raises(
        NonFiniteError, match=f"the loss of backward pass 1 is inf .*examples: {'0' if at % 2 else '4'}"
    ):
        stopped.update(1, cut(tiny_batch(), SIZES))


def test_an_average_takes_in_no_skipped_update() -> None:
    trainer = AveragingTrainer(AverageConfig())
    updater = make(tiny_model(), trainer, loss=InfiniteAbove(2), nonfinite="skip")
    updater.update(1, [tiny_batch()])
    average = copy.deepcopy(trainer.weight_state)
    updater.update(2, [tiny_batch()])
    torch.testing.assert_close(trainer.weight_state, average, rtol=0, atol=0)
    assert trainer.seen == 1


@pytest.mark.parametrize("scale", [1.0, 2.0**10, 2.0**40])
def test_weights_are_moved_in_fp16_as_far_as_without_a_loss_scale(scale: float) -> None:
    found = []
    for first in (1.0, scale):
        model, batch = tiny_model(torch.float32), tiny_batch(dtype=torch.float32)
        updater = make(model, SamTrainer(SamConfig(rho=0.5)), precision="fp16")
        set_scale(updater, first)
        before = copy.deepcopy(model.state_dict())
        number, logs = 1, updater.update(1, cut(batch, SIZES))
        while not logs["gradient_norm"].isfinite():  # overflows lower the scale, and leave the weights
            torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
            assert updater.skipped == 0
            number, logs = number + 1, updater.update(number + 1, cut(batch, SIZES))
        assert updater.precision.loss_scale == first / 2 ** (number - 1)
        found.append(torch.cat([(model.state_dict()[n] - before[n]).flatten() for n in before]))
    assert (found[1] - found[0]).norm() < 0.02 * found[0].norm()


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda frame: frame.accumulate(), r"Wrong\.update has not called frame\.step\(\)"),
        (lambda frame: frame.step(), "step.. comes once an update: after accumulate"),
        (lambda frame: (frame.accumulate(), frame.step(), frame.step()), "step.. comes once an update"),
        (lambda frame: (frame.accumulate(), frame.step(), frame.accumulate()), "accumulate.. must come before step"),
    ],
)
def test_a_step_comes_once_and_after_the_micro_batches(update: Callable[[Frame], Any], message: str) -> None:
    class Wrong(StandardTrainer):
        def update(self, frame: Frame) -> Logs:
            update(frame)
            return {}

    with pytest.raises(RuntimeError, match=message):
        make(tiny_model(), Wrong()).update(1, [tiny_batch()])


def test_no_step_is_taken_from_where_weights_have_moved_to() -> None:
    class Wrong(StandardTrainer):
        def update(self, frame: Frame) -> Logs:
            frame.accumulate()
            with frame.moved({}):
                frame.step()
            return {}

    with pytest.raises(RuntimeError, match="outside of moved"):
        make(tiny_model(), Wrong()).update(1, [tiny_batch()])
