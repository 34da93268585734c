"""What is counted without numbers is what a real step takes, to the byte and the operation."""

import pytest
import torch
from planned import batch_of, model_of, recipe
from torch.utils.flop_counter import FlopCounterMode

from villa.batch import Batch
from villa.config.schema import RunConfig
from villa.engine.passes import ModelPasses
from villa.engine.precision import Precision
from villa.models.base import Model
from villa.planning.ledger import Ledger
from villa.planning.measure import count
from villa.registry import LOSSES, TRAINERS

METHODS = ["trainer=standard", "trainer=freelb", "trainer=villa"]
TEXT = ["trainer=villa", "trainer.modality=text", "trainer.clean_loss=false", "trainer.clean_logits=detached"]


def passes_of(config: RunConfig, model: Model) -> ModelPasses:
    passes = ModelPasses(
        model,
        LOSSES.get(config.loss.name)(config.loss),
        Precision(config.training.precision, torch.device("cpu")),
        0,
    )
    passes.begin(1, 0, 1.0)
    return passes


def step(config: RunConfig, model: Model, batch: Batch) -> None:
    TRAINERS.get(config.trainer.name)(config.trainer).step(batch, passes_of(config, model))


@pytest.mark.parametrize("method", [*([m] for m in METHODS), TEXT], ids="_".join)
def test_memory_is_what_real_tensors_take(method: list[str]) -> None:
    config = recipe(*method, "trainer.init=zero" if "standard" not in method[0] else "seed=0")
    batch, model = batch_of(), model_of(config, "cpu")
    real = Ledger()
    real.book(model.parameters(), "held")
    real.book([t for t in vars(batch).values() if isinstance(t, torch.Tensor)], "other")
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: real.book([p.grad], "gradient"))
    with real:
        real.reset()
        step(config, model, batch)
    planned = count(config, model_of(config), batch)
    assert planned.gradients == real.live["gradient"]  # the embedding of masked regions has none
    assert planned.activations == pytest.approx(real.peak_other, rel=0.01)
    assert planned.passes == pytest.approx(real.peak, rel=0.01)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_operations_are_those_of_torch(method: str, dropout: float) -> None:
    config = recipe(method, f"model.attention_dropout={dropout}")
    model, batch = model_of(config, "cpu"), batch_of()
    with FlopCounterMode(display=False) as counter:
        step(config, model, batch)
    planned = count(config, model_of(config), batch).flops
    if dropout:
        assert planned == counter.get_total_flops()
    else:  # torch does not count the kernel of attention on a CPU
        assert planned > counter.get_total_flops()


@pytest.mark.parametrize("precision", ["fp16"])
def test_autocast_halves_what_matrix_products_keep(precision: str) -> None:
    def activations(name: str, device: str) -> int:
        config = recipe("trainer=standard", f"training.precision={name}", "model.hidden_size=64")
        return count(config, model_of(config), batch_of(64), device).activations

    assert 0.4 < activations(precision, "cpu") / activations("fp32", "cpu") < 0.85
    assert activations(precision, "cuda") < activations(precision, "cpu")
