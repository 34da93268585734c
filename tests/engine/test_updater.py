"""The updater: accumulation, clipping, learning rates, mixed precision, and its state."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from shapes.model import AverageModel
from tiny import gradients, tiny_batch, tiny_model
from torch import Tensor
from updaters import adamw, cut, descent, make, set_scale

from villa.batch import Batch
from villa.engine.schedules import LinearSchedule, ScheduleConfig
from villa.engine.updater import Updater
from villa.models.base import Model
from villa.registry import OPTIMIZERS
from villa.trainers.base import Trainer
from villa.trainers.freelb import FreeLBConfig, FreeLBTrainer
from villa.trainers.standard import StandardTrainer
from villa.trainers.villa import VillaConfig, VillaTrainer

#: Perturbations start at zero: a random start depends on how the examples are cut into micro-batches.
TRAINERS: dict[str, Trainer] = {
    "standard": StandardTrainer(),
    "freelb": FreeLBTrainer(FreeLBConfig(init="zero", text_step_size=0.3, image_step_size=0.3)),
    "villa": VillaTrainer(VillaConfig(init="zero", text_step_size=0.3, image_step_size=0.3)),
}


def moved(before: Model, after: Model) -> dict[str, Tensor]:
    """How far every parameter went down."""
    old = dict(before.named_parameters())
    return {name: (old[name] - parameter).detach() for name, parameter in after.named_parameters()}


def after(model: Model, sizes: Sequence[int], trainer: Trainer, accumulation: str = "mean") -> dict[str, Tensor]:
    trained = copy.deepcopy(model)
    make(trained, trainer, accumulation=accumulation).update(1, cut(tiny_batch(), sizes))
    return moved(model, trained)


def clean_gradients(model: AverageModel, batch: Batch) -> dict[str, Tensor]:
    """Gradients of the mean cross-entropy, by hand."""
    copied = copy.deepcopy(model)
    torch.nn.functional.cross_entropy(copied(batch).logits, batch.targets).backward()
    return gradients(copied)


@pytest.mark.parametrize("sizes", [(3, 3), (4, 2), (1, 3, 2)])
@pytest.mark.parametrize("name", TRAINERS)
def test_the_mean_over_micro_batches_is_that_over_the_whole_update(name: str, sizes: tuple[int, ...]) -> None:
    model = tiny_model()
    whole = after(model, (6,), TRAINERS[name])
    torch.testing.assert_close(after(model, sizes, TRAINERS[name]), whole, rtol=1e-9, atol=1e-12)
    assert all(value.abs().max() > 1e-6 for value in whole.values())


def test_the_sum_adds_the_micro_batches_means() -> None:
    model, parts = tiny_model(), cut(tiny_batch(), (4, 2))
    first, second = (clean_gradients(model, part) for part in parts)
    expected = {name: first[name] + second[name] for name in first}
    torch.testing.assert_close(after(model, (4, 2), StandardTrainer(), "sum"), expected)


@pytest.mark.parametrize("sizes", [(6,), (4, 2)])
def test_the_total_is_that_over_the_examples(sizes: tuple[int, ...]) -> None:
    model = tiny_model()
    expected = {name: 6 * value for name, value in clean_gradients(model, tiny_batch()).items()}
    torch.testing.assert_close(after(model, sizes, StandardTrainer(), "total"), expected)


def test_logs_are_means_over_the_examples() -> None:
    model, parts = tiny_model(), cut(tiny_batch(), (4, 2))
    losses = [torch.nn.functional.cross_entropy(model(part).logits, part.targets) for part in parts]
    logs = make(model).update(1, parts)
    torch.testing.assert_close(logs["loss"], (4 * losses[0] + 2 * losses[1]).detach() / 6)
    assert not logs["loss"].requires_grad


def test_every_group_follows_the_schedule_with_its_own_multiplier() -> None:
    model, batch = tiny_model(), tiny_batch()
    expected = clean_gradients(model, batch)
    trained = copy.deepcopy(model)
    schedule = LinearSchedule(ScheduleConfig(), 4)
    make(trained, optimizer=descent(trained, lr_multipliers={"head": 10.0}), schedule=schedule).update(3, [batch])
    for name, step in moved(model, trained).items():
        rate = 0.25 * (10 if name.startswith("head.") else 1)
        torch.testing.assert_close(step, rate * expected[name])


def test_clipping_bounds_the_norm_of_all_gradients_and_logs_it_unclipped() -> None:
    model, batch = tiny_model(), tiny_batch()
    norm = torch.cat([g.flatten() for g in clean_gradients(model, batch).values()]).norm()
    trained = copy.deepcopy(model)
    logs = make(trained, clip_norm=0.01).update(1, [batch])
    torch.testing.assert_close(logs["gradient_norm"], norm)
    assert norm > 0.01
    scaled = {n: g * 0.01 / (norm + 1e-6) for n, g in clean_gradients(model, batch).items()}  # torch adds the 1e-6
    torch.testing.assert_close(moved(model, trained), scaled)


@pytest.mark.parametrize("name", ["adamw", "bert_adamw", "adam", "adamax"])
def test_the_step_is_that_of_the_optimizer_on_the_same_gradients(name: str) -> None:
    factory = OPTIMIZERS.get(name)
    config = factory.Config(name=name, lr=0.1)
    ours, reference = tiny_model(), tiny_model()
    updater = make(ours, optimizer=factory(config).build(ours))
    optimizer = factory(config).build(reference)
    for number in (1, 2):
        batch = tiny_batch(start=6 * number)
        updater.update(number, [batch])
        torch.nn.functional.cross_entropy(reference(batch).logits, batch.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(ours.state_dict(), reference.state_dict())
    assert not ours.words.weight.equal(tiny_model().words.weight)


def test_under_autocast_perturbations_and_losses_stay_in_fp32() -> None:
    model, batch = tiny_model(torch.float32), tiny_batch(dtype=torch.float32)
    seen: list[torch.dtype] = []
    model.head[-1].register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    updater = make(model, VillaTrainer(VillaConfig(steps=2, modality="both")), precision="bf16")
    perturbations: list[torch.dtype] = []
    real = updater.passes.forward

    def forward(*args: Any, **options: Any) -> Any:
        output = real(*args, **options)
        assert output.logits.dtype == torch.float32
        given = args[1] if len(args) > 1 else None
        perturbations.extend(p.delta.dtype for p in (given or {}).values() if p.delta is not None)
        return output

    updater.passes.forward = forward  # type: ignore[method-assign]
    logs = updater.update(1, [batch])
    assert seen == [torch.bfloat16] * 3
    assert perturbations == [torch.float32] * 4
    assert {value.dtype for value in logs.values()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_bf16_gradients_are_close_to_fp32_but_not_equal() -> None:
    model, batch = tiny_model(torch.float32), tiny_batch(dtype=torch.float32)
    wide, narrow = copy.deepcopy(model), copy.deepcopy(model)
    make(wide).update(1, [batch])
    make(narrow, precision="bf16").update(1, [batch])
    expected, found = moved(model, wide), moved(model, narrow)
    for name, value in expected.items():
        assert not found[name].equal(value)
        assert (found[name] - value).norm() < 0.05 * value.norm()


def fp16(scale: float, trainer: Trainer | None = None, **training: Any) -> Updater:
    """An updater in fp16 that stands at a loss scale."""
    model = tiny_model(torch.float32)
    updater = make(model, trainer, adamw(model), precision="fp16", **training)
    set_scale(updater, scale)
    return updater


@pytest.mark.parametrize("name", ["standard", "villa"])
def test_an_fp16_overflow_skips_the_step_and_lowers_the_loss_scale(name: str) -> None:
    updater, batch = fp16(2.0**40, TRAINERS[name], clip_norm=1.0), tiny_batch(dtype=torch.float32)
    before = copy.deepcopy(updater.model.state_dict())
    logs = updater.update(1, [batch])
    assert not logs["gradient_norm"].isfinite()
    assert logs["loss"].isfinite()
    torch.testing.assert_close(updater.model.state_dict(), before, rtol=0, atol=0)
    for moments in updater.optimizer.state.values():  # a fused optimiser makes them, and skips by itself
        assert not any(value.any() for value in moments.values())
    assert updater.precision.loss_scale == 2.0**39
    assert updater.skipped == 0
    number = 2
    while not logs["gradient_norm"].isfinite():
        logs = updater.update(number, [batch])
        number += 1
    assert 1 < updater.precision.loss_scale < 2.0**39
    assert not updater.model.state_dict()["words.weight"].equal(before["words.weight"])


@pytest.mark.parametrize("clip_norm", [None, 0.01])
@pytest.mark.parametrize("name", TRAINERS)
def test_the_loss_scale_changes_neither_gradients_nor_clipping(name: str, clip_norm: float | None) -> None:
    steps, norms = [], []
    for scale in (1.0, 2.0**10):
        model, batch = tiny_model(torch.float32), tiny_batch(dtype=torch.float32)
        before = copy.deepcopy(model)
        updater = make(model, TRAINERS[name], precision="fp16", clip_norm=clip_norm)
        set_scale(updater, scale)
        norms.append(updater.update(1, cut(batch, (4, 2)))["gradient_norm"].item())
        steps.append(moved(before, model))
    assert norms[1] == pytest.approx(norms[0], rel=0.01)  # fp16 rounds small gradients
    for parameter, step in steps[0].items():
        assert (steps[1][parameter] - step).norm() < 0.02 * step.norm()


def test_state_goes_on_exactly_also_in_fp16() -> None:
    straight, broken = fp16(2.0**22), fp16(2.0**22)
    batches = [[tiny_batch(start=6 * i, dtype=torch.float32)] for i in range(6)]
    for number in range(1, 7):
        straight.update(number, batches[number - 1])
    for number in range(1, 4):
        broken.update(number, batches[number - 1])
    state, weights = copy.deepcopy(broken.state_dict()), copy.deepcopy(broken.model.state_dict())
    resumed = fp16(1.0)
    resumed.model.load_state_dict(weights)
    resumed.load_state_dict(state)
    for number in range(4, 7):
        resumed.update(number, batches[number - 1])
    torch.testing.assert_close(resumed.model.state_dict(), straight.model.state_dict(), rtol=0, atol=0)
    for parameter, other in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        ours, theirs = resumed.optimizer.state[parameter], straight.optimizer.state[other]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert resumed.precision.scaler.state_dict() == straight.precision.scaler.state_dict()
    assert straight.precision.loss_scale < 2.0**22  # some of the six were overflows


def test_loading_keeps_this_runs_weight_decay_and_gives_each_parameter_its_own_moments() -> None:
    model = tiny_model()
    first = make(model, optimizer=adamw(model))
    first.update(1, [tiny_batch()])
    # Other groups, so that the parameters are numbered in another order.
    optimizer = adamw(model, weight_decay=0.5, lr_multipliers={"head": 2.0, "words": 3.0})
    second = make(model, optimizer=optimizer)
    second.load_state_dict(first.state_dict())
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.5}
    for parameter in model.parameters():
        ours, theirs = optimizer.state[parameter], first.optimizer.state[parameter]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_state_of_other_parameters_is_refused() -> None:
    model, other = tiny_model(), tiny_model()
    other.head.requires_grad_(False)
    with pytest.raises(ValueError, match=r"the trained parameters differ: 'head.0.bias' \(4 in all\)"):
        make(model).load_state_dict(make(other).state_dict())
