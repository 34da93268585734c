"""Compiled layers compute what layers do, under every strategy."""

from pathlib import Path
from typing import Any

import compiled_updates
import pair
import pytest
import torch
import updates

from villa.distributed.strategy import Strategy


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What came out of every strategy on two processes."""
    output: Path = tmp_path_factory.mktemp("pair") / "results.pt"
    with pair.server() as context:
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


def test_one_process_computes_what_layers_do_also_a_second_time(tmp_path: Path) -> None:
    plain = updates.run(Strategy(), **updates.CASES[compiled_updates.CASE])
    with pair.server() as context:  # not in this process: code with probes (--probes) cannot be compiled
        assert pair.in_processes(context, compiled_updates.work_alone, str(tmp_path / "compiled.pt"), count=1) == [0]
    compiled = torch.load(tmp_path / "compiled.pt", weights_only=True)
    assert compiled.keys() == plain["parameters"].keys()
    for name, value in plain["parameters"].items():
        torch.testing.assert_close(compiled[name], value, rtol=0, atol=1e-12)
