"""The passes that the loop lends a trainer: randomness, scaling, and what they remember."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from shapes.model import AverageModel
from tiny import CPU, gradients, tiny_batch, tiny_model
from torch import nn

from villa.adversarial.ascent import AscentSettings
from villa.adversarial.perturbation import Perturbation
from villa.engine.passes import ModelPasses, Precision
from villa.losses.classification import CrossEntropy

BATCH = tiny_batch()


def with_dropout() -> AverageModel:
    model = tiny_model()
    model.head[1] = nn.Sequential(nn.GELU(), nn.Dropout(0.5))
    return model


def passes(model: AverageModel, seed: int = 0) -> ModelPasses:
    made = ModelPasses(model, CrossEntropy(), Precision("fp32", CPU), seed)
    made.begin(1, 0, 1.0)
    return made


def test_dropout_depends_on_seed_update_micro_batch_and_pass_alone() -> None:
    model = with_dropout()
    lent = passes(model)
    first = lent.forward(BATCH, index=1).logits
    torch.rand(100)  # other draws do not matter
    assert lent.forward(BATCH, index=1).logits.equal(first)
    others = [lent.forward(BATCH, index=2), passes(model, seed=1).forward(BATCH, index=1)]
    for update, micro_batch in ((2, 0), (1, 1)):
        lent.begin(update, micro_batch, 1.0)
        others.append(lent.forward(BATCH, index=1))
    assert not any(other.logits.equal(first) for other in others)


def test_seeds_of_draws_differ_by_name_and_place_and_are_the_same_again() -> None:
    lent = passes(tiny_model())
    seeds = [lent.seed("text"), lent.seed("image"), passes(tiny_model(), seed=1).seed("text")]
    lent.begin(1, 1, 1.0)
    seeds.append(lent.seed("text"))
    lent.begin(1, 0, 1.0)
    assert lent.seed("text") == seeds[0]
    assert len(set(seeds)) == 4


def test_a_perturbation_is_added_in_its_pass_only() -> None:
    model = tiny_model()
    lent = passes(model)
    clean = lent.forward(BATCH).logits
    delta = Perturbation(AscentSettings(step_size=1.0, init="normal", init_scale=1.0), seed=3)
    assert not lent.forward(BATCH, {"image": delta}).logits.equal(clean)
    assert lent.forward(BATCH).logits.equal(clean)
    assert {*lent.points} == {"text", "image"}


def test_gradients_are_scaled_by_the_weight_and_the_loss_scale() -> None:
    model = tiny_model(torch.float32)
    batch = tiny_batch(dtype=torch.float32)
    lent = passes(model)
    lent.backward(lent.loss(lent.forward(batch), batch), last=True)
    plain = gradients(model)
    model.zero_grad()
    lent.precision.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    lent.begin(1, 0, 0.25)
    assert lent.gradient_scale == 2.0
    lent.backward(lent.loss(lent.forward(batch), batch), last=True)
    torch.testing.assert_close(gradients(model), {name: 2 * value for name, value in plain.items()})


def test_losses_are_remembered_for_the_update_unscaled_and_detached() -> None:
    lent = passes(tiny_model())
    values = []
    for micro_batch in (0, 1):
        lent.begin(5, micro_batch, 0.5)
        loss = lent.loss(lent.forward(BATCH), BATCH)
        lent.backward(loss, last=True)
        values.append((micro_batch, loss.detach()))
    assert lent.losses == values
    assert not lent.losses[0][1].requires_grad
    lent.begin(6, 0, 1.0)
    assert lent.losses == []


def test_without_gradients_there_is_no_graph() -> None:
    assert not passes(tiny_model()).forward(BATCH, grad=False).logits.requires_grad


@pytest.mark.parametrize(
    ("precision", "size", "warned"), [("bf16", 1e-5, True), ("bf16", 0.1, False), ("fp32", 1e-5, False)]
)
def test_a_perturbation_that_the_precision_rounds_away_is_named_once(
    precision: Any, size: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = tiny_model(torch.float32), tiny_batch(dtype=torch.float32)
    lent = ModelPasses(model, CrossEntropy(), Precision(precision, CPU), 0)
    settings = AscentSettings(step_size=0.0, norm="linf", init="uniform", init_scale=size)
    for number in (1, 2):
        lent.begin(number, 0, 1.0)
        lent.forward(batch, {"text": Perturbation(replace(settings, init_scale=0.0))})
        lent.forward(batch, {"text": Perturbation(settings)})
    found = [record.message for record in caplog.records if "rounds away in most entries" in record.message]
    assert len(found) == warned
    assert all("(text)" in message and "bfloat16" in message for message in found)


@pytest.mark.parametrize(
    ("size", "train", "warnings"),
    [
        (1e-4, True, ["(text) is 1e-05 of the embedding, too little", "from clean predictions is "]),
        (1e-4, False, ["from clean predictions is "]),  # an attack's own size
        (1.0, True, []),
        (0.0, True, []),  # as before the first step
    ],
)
def test_a_perturbation_too_small_to_change_predictions_is_named_once(
    size: float, train: bool, warnings: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    lent = ModelPasses(tiny_model(), CrossEntropy(), Precision("fp32", CPU), 0)
    settings = AscentSettings(step_size=0.0, init="normal", init_scale=size, projection="sphere", radius=size)
    for number in (1, 2):
        lent.begin(number, 0, 1.0)
        clean, moved = (lent.forward(BATCH, given, train=train) for given in (None, {"text": Perturbation(settings)}))
        assert (lent.consistency(moved, clean, BATCH) < 1e-9) == (size < 1)
    found = [record.message for record in caplog.records]
    assert len(found) == len(warnings)
    assert all(part in message for part, message in zip(warnings, found, strict=True))
