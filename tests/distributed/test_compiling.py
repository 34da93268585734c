"""Compiled layers compute what layers do, under every strategy."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compiled_updates
import pair
import pytest
import torch
import updates

from villa.distributed.strategy import Strategy


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    with pair.server() as made:
        yield made


@pytest.fixture(scope="module")
def found(context: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What came out of every strategy on two processes."""
    output: Path = tmp_path_factory.mktemp("pair") / "results.pt"
    assert pair.in_processes(context, compiled_updates.work, str(output)) == [0, 0]
    return torch.load(output, weights_only=True)


@pytest.mark.parametrize("strategy", compiled_updates.DTYPES)
def test_parameters_after_three_updates_are_those_of_one_process_without_compiling(
    strategy: str, found: dict[str, Any]
) -> None:
    alone = compiled_updates.run(Strategy(), strategy)
    tolerance = 1e-10 if compiled_updates.DTYPES[strategy] == torch.float64 else 1e-6
    updates.assert_same(found[strategy], alone, tolerance, strategy)
    for modality, ours, theirs in found[strategy]["deltas"]:
        assert (ours - theirs).abs().max() <= tolerance, f"{strategy} {modality}"
    assert len(found[strategy]["deltas"]) == 12  # two modalities of two micro-batches of three updates


@pytest.fixture(scope="module")
def alone(context: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What came out on one process; not in this one, for code with probes (--probes) cannot be compiled."""
    output: Path = tmp_path_factory.mktemp("alone") / "results.pt"
    assert pair.in_processes(context, compiled_updates.work_alone, str(output), count=1) == [0]
    return torch.load(output, weights_only=True)


def test_one_process_computes_what_layers_do_also_a_second_time(alone: dict[str, Any]) -> None:
    plain = updates.run(Strategy(), **compiled_updates.ALONE)
    compiled = alone["parameters"]
    assert compiled.keys() == plain["parameters"].keys()
    for name, value in plain["parameters"].items():
        torch.testing.assert_close(compiled[name], value, rtol=0, atol=1e-12)


def test_dropout_belongs_to_the_program_and_draws_the_same_masks(alone: dict[str, Any]) -> None:
    plain, compiled = alone["masks"]
    assert 0 < plain["values"].eq(0).sum() < plain["values"].numel()
    assert all(torch.equal(compiled[name], value) for name, value in plain.items())
