"""Ascents alone: the gradient of perturbations and no other, what it costs, and passes without dropout."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from shapes.model import AverageModel
from shapes.smart import SmartConfig, SmartTrainer
from strangers import Overflowing
from tiny import CPU, tiny_batch, tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from updaters import adamw, make, set_scale

from villa.adversarial.ascent import AscentSettings
from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.config.schema import DistributedConfig
from villa.distributed.strategy import Strategy
from villa.engine.passes import ModelPasses, Precision
from villa.errors import NonFiniteError
from villa.facts import DataFacts
from villa.losses.classification import CrossEntropy
from villa.models.base import Model
from villa.models.uniter.config import UniterConfig
from villa.models.uniter.model import Uniter
from villa.trainers.standard import StandardTrainer

BATCH = tiny_batch()
WORDS, WIDTH, LABELS = 30, 6, 3


def uniter() -> Model:
    """A model whose matrix products outweigh all else: two layers of width 64, with dropout, in float64."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 256, "max_positions": 8}
    config = UniterConfig(name="uniter", head="classification", **sizes)  # type: ignore[arg-type]
    return Uniter.from_config(config, DataFacts(WORDS, LABELS, WIDTH)).double()


def whole_batch() -> Batch:
    """Four examples without padding."""
    draw = torch.Generator().manual_seed(1)
    return Batch(
        ids=list("0123"),
        input_ids=torch.randint(1, WORDS, (4, 5), generator=draw),
        attention_mask=torch.ones(4, 5, dtype=torch.bool),
        features=torch.randn(4, 4, WIDTH, generator=draw, dtype=torch.float64),
        boxes=torch.rand(4, 4, 4, generator=draw, dtype=torch.float64),
        region_mask=torch.ones(4, 4, dtype=torch.bool),
        targets=torch.randint(LABELS, (4,), generator=draw),
    )


def lent(model: Model, weight: float = 1.0, precision: Any = "fp32") -> ModelPasses:
    made = ModelPasses(model, CrossEntropy(), Precision(precision, CPU), 0)
    made.begin(1, 0, weight)
    return made


def noise() -> Perturbation:
    return Perturbation(AscentSettings(step_size=0.1, init="normal", init_scale=0.5), seed=3)


def test_an_ascent_leaves_the_loss_s_own_gradient_and_no_other() -> None:
    model = tiny_model()
    passes = lent(model, weight=0.25)
    passes.backward(passes.loss(passes.forward(BATCH), BATCH), last=False)
    model.head[0].weight.grad = None
    before = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    deltas = {"text": noise(), "image": noise()}
    loss = passes.loss(passes.forward(BATCH, deltas), BATCH)
    expected = torch.autograd.grad(loss, [delta.trained() for delta in deltas.values()], retain_graph=True)
    passes.gradient(loss, deltas)
    for delta, gradient in zip(deltas.values(), expected, strict=True):
        assert delta.delta is not None
        assert delta.delta.grad is not None
        assert delta.delta.grad.equal(gradient)
        assert gradient.abs().max() > 1e-3
    for name, parameter in model.named_parameters():
        kept = before[name]
        assert parameter.grad is None if kept is None else parameter.grad is not None and parameter.grad.equal(kept)


def test_the_loss_scale_is_not_in_the_gradient() -> None:
    model, batch = tiny_model(torch.float32), tiny_batch(dtype=torch.float32)
    found = []
    for scale in (1.0, 2.0**12):
        passes, delta = lent(model, precision="fp16"), noise()
        passes.precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        passes.gradient(passes.loss(passes.forward(batch, {"text": delta}), batch), {"text": delta})
        found.append(delta.trained().grad)
    torch.testing.assert_close(found[1], found[0], rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_an_ascent_costs_two_thirds_of_a_full_pass(modality: str) -> None:
    model, batch = uniter(), whole_batch()
    passes = lent(model)

    def flops(back: Callable[[torch.Tensor, dict[str, Perturbation]], None]) -> int:
        delta = {modality: noise()}
        with FlopCounterMode(display=False) as counter:
            back(passes.loss(passes.forward(batch, delta), batch), delta)
        return int(counter.get_total_flops())

    full = flops(lambda loss, _: passes.backward(loss, last=True))
    ascent = flops(passes.gradient)
    assert 0.64 < ascent / full < 0.7


def test_what_has_no_gradient_says_why() -> None:
    model, delta = tiny_model(), noise()
    passes = lent(model)
    with pytest.raises(RuntimeError, match="no forward pass has added it since it last moved"):
        passes.gradient(passes.loss(passes.forward(BATCH), BATCH), {"text": delta})
    loss = passes.loss(passes.forward(BATCH, {"text": delta}), BATCH)
    passes.gradient(loss, {"text": delta})
    delta.ascend()
    with pytest.raises(RuntimeError, match="no forward pass has added it since it last moved"):
        passes.gradient(loss, {"text": delta})
    delta.frozen = True
    loss = passes.loss(passes.forward(BATCH, {"text": delta}), BATCH)
    with pytest.raises(RuntimeError, match="it is frozen"):
        passes.gradient(loss, {"text": delta})


def with_dropout() -> AverageModel:
    model = tiny_model()
    model.head[1] = nn.Sequential(nn.GELU(), nn.Dropout(0.5), nn.Dropout(0.5))
    model.head[1][2].eval()  # as a frozen part is
    return model


def test_a_pass_without_training_has_no_dropout_and_puts_every_mode_back() -> None:
    model = with_dropout()
    modes = [module.training for module in model.modules()]
    passes = lent(model)
    expected = copy.deepcopy(model).eval()(BATCH).logits
    assert passes.forward(BATCH, train=False).logits.equal(expected)
    assert [module.training for module in model.modules()] == modes
    assert not passes.forward(BATCH).logits.equal(expected)
    model.head[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        passes.forward(BATCH, train=False)
    assert [module.training for module in model.modules()] == modes


def test_layers_that_are_computed_twice_have_no_dropout_the_second_time_either() -> None:
    found = []
    for recomputed in (False, True):
        model, delta = uniter(), noise()
        Strategy(DistributedConfig(activation_checkpointing=recomputed)).apply(model)
        passes = lent(model)
        loss = passes.loss(passes.forward(whole_batch(), {"text": delta}, train=False), whole_batch())
        assert model.training
        passes.gradient(loss, {"text": delta})
        found.append(delta.trained().grad)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


def test_an_overflow_in_an_ascent_skips_the_step_and_lowers_the_loss_scale() -> None:
    model, batch = tiny_model(torch.float32), tiny_batch(10, dtype=torch.float32)
    updater = make(model, Overflowing(), adamw(model), precision="fp16")
    set_scale(updater, 1024.0)
    before = copy.deepcopy(model.state_dict())
    logs = updater.update(1, [batch])
    assert logs["loss"].isfinite()
    assert logs["gradient_norm"].isfinite()
    assert updater.precision.loss_scale == 512.0
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    updater.update(2, [tiny_batch(dtype=torch.float32)])  # without example 9
    assert not model.state_dict()["words.weight"].equal(before["words.weight"])


class InfiniteSlope(SmartTrainer):
    """Its ascent's gradient is infinite at any scale, though no loss is."""

    def step(self, batch: Any, passes: Any) -> Any:
        delta = Perturbation(AscentSettings(step_size=0.1))
        output = passes.forward(batch, {"text": delta})
        assert delta.delta is not None
        passes.gradient(output.logits.sum() * 0 + delta.delta.sqrt().sum(), {"text": delta})
        return super().step(batch, passes)


def test_an_ascent_that_is_not_finite_otherwise_is_named() -> None:
    model = tiny_model()
    updater = make(model, InfiniteSlope(SmartConfig()))
    with pytest.raises(NonFiniteError) as caught:
        updater.update(1, [BATCH])
    assert str(caught.value).startswith(
        "update 1: the gradient of a perturbation (text) is not finite; examples: 0, 1, 2, 3, 4, 5; lower "
    )
    skipping = make(tiny_model(), InfiniteSlope(SmartConfig()), nonfinite="skip")
    skipping.update(1, [BATCH])
    assert skipping.skipped == 1
    plain = make(tiny_model(), StandardTrainer())  # without perturbations the update is finite
    plain.update(1, [BATCH])
    torch.testing.assert_close(skipping.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)
