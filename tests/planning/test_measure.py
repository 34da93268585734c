"""What is counted without numbers is what a real step takes, to the byte and the operation."""

import weakref

import pytest
import torch
from planned import batch_of, model_of, recipe
from torch.utils.flop_counter import FlopCounterMode

from villa.batch import Batch
from villa.config.schema import RunConfig
from villa.distributed.blocks import checkpoint_activations
from villa.engine.passes import ModelPasses, Precision
from villa.models.base import Model
from villa.planning.measure import Counted, Ledger, bytes_of, count
from villa.planning.strategies import rank_memory
from villa.registry import LOSSES, OPTIMIZERS, TRAINERS

AGAIN = "distributed.activation_checkpointing=true"
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
    if config.distributed.activation_checkpointing:
        checkpoint_activations(model)
    TRAINERS.get(config.trainer.name)(config.trainer).step(batch, passes_of(config, model))


LAYERS = ["trainer=villa", "trainer.points={text: layer.1, image: [embeddings, layer.0]}"]


@pytest.mark.parametrize("method", [*([m] for m in METHODS), TEXT, LAYERS, [METHODS[2], AGAIN]], ids="_".join)
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


def test_villa_costs_seven_standard_passes() -> None:
    standard, villa = (count(recipe(method), model_of(recipe(method)), batch_of()) for method in METHODS[::2])
    assert villa.flops / standard.flops == pytest.approx(7, rel=0.05)
    assert (standard.forwards, standard.backwards, standard.uses) == (1, 1, 2)
    assert (villa.forwards, villa.backwards, villa.uses) == (7, 6, 14)


def test_villa_keeps_two_graphs_where_the_clean_one_is_trained() -> None:
    standard, detached, attached = (
        count(recipe(*values), model_of(recipe(*values)), batch_of(32)).activations
        for values in (["trainer=standard"], TEXT, TEXT[:-1])
    )
    assert detached < 1.2 * standard
    assert attached == pytest.approx(2 * standard, rel=0.1)


@pytest.mark.parametrize(("precision", "device"), [("fp32", "cpu"), ("bf16", "cuda")])
def test_layers_that_are_computed_again_keep_their_inputs(precision: str, device: str) -> None:
    options = ["trainer=villa", f"training.precision={precision}", "model.hidden_size=64"]

    def counted(layers: int, *more: str) -> Counted:
        config = recipe(*options, f"model.num_layers={layers}", *more)
        return count(config, model_of(config), batch_of(128), device)

    two, four, kept = counted(2, AGAIN), counted(4, AGAIN), counted(4)
    graphs, inputs = 2, 128 * 14 * 64 * 4  # the clean pass waits for the one under way; LayerNorm returns fp32
    assert four.activations - two.activations == pytest.approx(2 * graphs * inputs, rel=0.02)
    assert kept.activations > 3 * four.activations
    assert four.flops / kept.flops == pytest.approx(4 / 3, rel=0.02)
    assert four.gradients == kept.gradients


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_autocast_halves_what_matrix_products_keep(precision: str) -> None:
    def activations(name: str, device: str) -> int:
        sizes = "model.hidden_size=64", "model.num_layers=6"
        config = recipe("trainer=standard", f"training.precision={name}", *sizes)
        return count(config, model_of(config), batch_of(64), device).activations

    assert 0.4 < activations(precision, "cpu") / activations("fp32", "cpu") < 0.85
    assert activations(precision, "cuda") < activations(precision, "cpu")


@pytest.mark.parametrize("again", [(), (AGAIN,)], ids=["kept", "again"])
def test_autocast_matches_that_of_a_cpu(again: tuple[str, ...]) -> None:
    config = recipe("trainer=standard", "training.precision=bf16", *again)
    model, batch, real = model_of(config, "cpu"), batch_of(32), Ledger()
    real.book(model.parameters(), "held")
    with real:
        real.reset()
        step(config, model, batch)
    planned = count(config, model_of(config), batch)
    assert planned.passes - planned.batch == pytest.approx(real.peak, rel=0.1)


@pytest.mark.parametrize(("name", "copies"), [("adamw", 2), ("bert_adamw", 2), ("adamax", 2), ("bert_adam", 2)])
def test_the_state_of_optimisers(name: str, copies: int) -> None:
    config = recipe(f"optimizer={name}")
    model = model_of(config)
    planned = count(config, model, batch_of())
    assert planned.optimizer == pytest.approx(copies * bytes_of(model), rel=0.02)
    assert (planned.step < 1000) == (name != "adamax")  # the fused kernel makes nothing
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_step_of_an_optimiser_is_what_real_tensors_take() -> None:
    config = recipe("optimizer=bert_adamw", "optimizer.fused=off")
    model = model_of(config, "cpu")
    step(config, model, batch_of())
    optimizer = OPTIMIZERS.get("bert_adamw")(config.optimizer).build(model)
    optimizer.step()
    real = Ledger()
    with real:
        optimizer.step()
    assert count(config, model_of(config), batch_of()).step == pytest.approx(real.peak_other, rel=0.01)


def test_random_state_and_torch_are_left_as_they_were() -> None:
    config, batch = recipe("trainer=villa"), batch_of()
    model = model_of(config)
    before, autocast = torch.get_rng_state(), torch.autocast
    count(config, model, batch)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.autocast is autocast


def test_a_ledger_forgets_what_is_freed() -> None:
    ledger = Ledger()
    with ledger:
        first = torch.empty(10, device="meta")
        view, whole = first.view(2, 5), first + 1
        assert ledger.live["other"] == 80
        ledger.book([whole], "held")
        del first, whole
        assert ledger.live == {"held": 0, "gradient": 0, "other": 40}
        gone = weakref.ref(view)
        del view
    assert gone() is None
    assert ledger.live["other"] == 0
    assert ledger.peak_other == 80


def test_averages_of_weights_are_counted_and_divided_like_the_parameters() -> None:
    proximal = ("trainer=smart", "trainer.proximal_weight=1")
    found = {}
    for options in ((), ("training.ema=0.9",), proximal, (*proximal, "training.ema=0.9")):
        config = recipe(*(options or ("trainer=standard",)))
        model = model_of(config)
        found[options] = counted = count(config, model, batch_of())
        alone = rank_memory(counted, model)
        assert alone.averages == counted.averages
        for strategy, share in (("ddp", 1), ("fairscale_sdp", 1), ("fsdp", 2), ("fairscale_fsdp", 2)):
            assert rank_memory(counted, model, strategy, 2).averages == counted.averages / share  # type: ignore[arg-type]
    trained = bytes_of(model_of(recipe("trainer=standard")))
    assert [counted.averages for counted in found.values()] == [0, trained, trained, 2 * trained]
    plain, averaged = (rank_memory(found[key], model) for key in ((), ("training.ema=0.9",)))
    assert averaged.peak == plain.peak + trained


def test_weights_that_are_perturbed_take_twice_the_operations() -> None:
    plain, twice = (
        count(
            recipe("trainer=villa", f"training.weight_perturbation.name={name}"),
            model_of(recipe("trainer=standard")),
            batch_of(),
        )
        for name in ("none", "sam")
    )
    assert twice.flops == 2 * plain.flops > 0
