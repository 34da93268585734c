import pytest
from planned import batch_of, model_of, recipe

from villa.errors import ConfigError
from villa.planning.measure import bytes_of, count
from villa.planning.strategies import gathered_bytes, layer_bytes, rank_memory


def test_sharding_divides_what_is_held() -> None:
    config = recipe("trainer=villa", "optimizer=bert_adamw")
    model = model_of(config)
    counted = count(config, model, batch_of())
    one, two, many = (rank_memory(counted, model, "fsdp", processes) for processes in (1, 2, 64))
    assert two.parameters == one.parameters / 2
    assert two.optimizer == one.optimizer / 2
    assert many.optimizer == one.optimizer / 64
    # K passes: gradients are whole until the last one.
    assert two.gradients == one.gradients == counted.gradients
    assert two.gathered == one.gathered == gathered_bytes(model) > 0
    assert rank_memory(counted, model, "fairscale_fsdp", 1).gathered == 0
    shared = rank_memory(counted, model, "fairscale_sdp", 4)
    assert (shared.parameters, shared.optimizer) == (counted.parameters, counted.optimizer / 4)


def test_one_backward_pass_shards_gradients_too() -> None:
    config = recipe("trainer=standard")
    model = model_of(config)
    counted = count(config, model, batch_of())
    assert rank_memory(counted, model, "fsdp", 4).gradients == counted.gradients / 4
    assert rank_memory(counted, model, "fsdp", 4, several=True).gradients == counted.gradients
    assert rank_memory(counted, model, "fsdp", 4, several=True, each_pass=True).gradients == counted.gradients / 4
    assert rank_memory(counted, model, "ddp", 4, several=True, each_pass=True).gradients == counted.gradients


def test_ddp_sends_copies_of_the_gradients() -> None:
    config = recipe("trainer=standard")
    model = model_of(config)
    counted = count(config, model, batch_of(3, 3, 2))  # hardly any activations: the parts that are sent decide
    single, ddp = rank_memory(counted, model), rank_memory(counted, model, "ddp", 8)
    assert ddp.gathered == counted.gradients
    assert ddp.peak >= counted.parameters + counted.optimizer + 2 * counted.gradients > single.peak
    assert rank_memory(counted, model, "ddp", 1) == single


def test_gradients_wait_for_the_micro_batches_that_follow() -> None:
    config = recipe("trainer=standard")
    model = model_of(config)
    counted = count(config, model, batch_of(64))
    one, several = rank_memory(counted, model), rank_memory(counted, model, several=True)
    assert several.peak - one.peak == counted.activations + counted.gradients - counted.passes > 0


def test_layers_are_gathered_one_by_one() -> None:
    model = model_of(recipe("model.num_layers=4"))
    layers = layer_bytes(model)
    assert len(layers) == 4
    assert gathered_bytes(model) == bytes_of(model) - sum(layers) + 3 * layers[0]


@pytest.mark.parametrize(("name", "processes"), [("fdsp", 2), ("single", 2), ("ddp", 0)])
def test_what_makes_no_sense_is_refused(name: str, processes: int) -> None:
    config = recipe("trainer=standard")
    model = model_of(config)
    with pytest.raises(ConfigError, match=r"did you mean 'fsdp'\?" if name == "fdsp" else "one process"):
        rank_memory(count(config, model, batch_of()), model, name, processes)  # type: ignore[arg-type]
