"""Two processes end with the parameters of one, whatever the strategy, the method and the number of micro-batches."""

from typing import Any

import pair
import pytest
import torch
import updates

from villa.distributed.strategy import Strategy

#: Rounding: everything is in fp64, but for mixed precision.
_TOLERANCE = {"bf16": 2e-3, "fp16": 2e-3}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What came out of every case under every strategy, on two processes."""
    output = tmp_path_factory.mktemp("pair") / "results.pt"
    with pair.server() as context:
        assert pair.in_processes(context, updates.work, str(output)) == [0, 0]
    return torch.load(output, weights_only=True)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What comes out of every case on one process."""
    return {name: updates.run(Strategy(), **settings) for name, settings in updates.CASES.items()}


@pytest.mark.parametrize("strategy", updates.STRATEGIES)
def test_parameters_after_three_updates_are_those_of_one_process(
    strategy: str, found: dict[str, Any], alone: dict[str, Any]
) -> None:
    cases = [name.removeprefix(f"{strategy}/") for name in found if name.startswith(f"{strategy}/")]
    cases.remove("collectives")
    assert cases == updates.cases_of(strategy)
    for case in cases:
        ours, theirs = found[f"{strategy}/{case}"], alone[case]
        tolerance = _TOLERANCE.get(case, 1e-10)
        updates.assert_same(ours, theirs, tolerance, f"{strategy} {case}")


def test_the_cases_tell_methods_and_micro_batches_apart(alone: dict[str, Any]) -> None:
    losses = [round(result["logs"]["loss"], 6) for result in alone.values()]
    assert len(set(losses)) > len(losses) - 4  # a few differ in what follows the loss alone


def test_gradients_are_reduced_once_an_update(found: dict[str, Any]) -> None:
    for strategy in ("ddp", "ddp+recomputed"):
        # The number of elements, one part of the gradients, who has which, and the values to log.
        assert {name: sum(count.values()) for name, count in found[f"{strategy}/collectives"].items()} == dict.fromkeys(
            ("standard", "freelb", "villa_alternating"), 4
        )
    layers_and_model = 3
    for count in found["fsdp/collectives"].values():
        assert count["reduce_scatter"] <= 2 * layers_and_model
    each = found["fsdp+each_pass/collectives"]["freelb"]["reduce_scatter"]
    assert each > found["fsdp/collectives"]["freelb"]["reduce_scatter"]


def test_activations_are_recomputed_with_the_same_dropout_and_perturbation() -> None:
    plain = updates.run(Strategy(), **updates.CASES["villa_both_4"])
    used = updates.connected("single", activation_checkpointing=True)
    again = updates.run(used, **updates.CASES["villa_both_4"])
    for name, value in plain["parameters"].items():
        torch.testing.assert_close(again["parameters"][name], value, rtol=0, atol=1e-12)
