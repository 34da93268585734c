"""Ascents alone, and methods that act on weights: under every strategy they lead to what they do in one process."""

from typing import Any

import method_updates
import pair
import pytest
import torch
import updates

from villa.distributed.strategy import Strategy


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What came out of everything on two processes, by rank."""
    output = tmp_path_factory.mktemp("pair") / "results"
    with pair.server() as context:
        assert pair.in_processes(context, method_updates.work, str(output)) == [0, 0]
    return [torch.load(f"{output}.{rank}", weights_only=True) for rank in (0, 1)]


def assert_same_deltas(result: dict[str, Any], tolerance: float, where: str) -> None:
    assert len(result["deltas"]) > 1
    for modality, ours, theirs in result["deltas"]:
        assert theirs.abs().max() > 0.01, where
        assert (ours - theirs).abs().max() <= tolerance, f"{where} {modality}"


@pytest.mark.parametrize("case", method_updates.ASCENTS)
def test_ascents_alone_lead_one_process_to_the_perturbations_of_villa(case: str) -> None:
    result = method_updates.ascents(Strategy(), case, torch.float64)
    assert_same_deltas(result, 1e-12, case)
    updates.assert_same(result["with"], result["without"], 0.0, case)


@pytest.mark.parametrize("strategy", method_updates.STRATEGIES)
def test_ascents_alone_lead_to_the_perturbations_of_villa_and_leave_nothing_else(
    strategy: str, found: list[dict[str, Any]]
) -> None:
    _, dtype, cases = method_updates.STRATEGIES[strategy]
    for case in (case for case in cases if case in method_updates.ASCENTS):
        for ranks in found:
            result = ranks[f"{strategy}/{case}"]
            assert_same_deltas(result, 1e-12 if dtype == torch.float64 else 1e-6, f"{strategy} {case}")
        result = found[0][f"{strategy}/{case}"]
        updates.assert_same(result["with"], result["without"], 0.0, f"{strategy} {case}")


@pytest.mark.parametrize("strategy", method_updates.STRATEGIES)
def test_methods_end_with_the_parameters_of_one_process(strategy: str, found: list[dict[str, Any]]) -> None:
    _, dtype, cases = method_updates.STRATEGIES[strategy]
    for case in (case for case in cases if case in method_updates.METHODS):
        alone = method_updates.method(Strategy(), case, dtype)
        ours = found[0][f"{strategy}/{case}"]
        tolerance = 1e-10 if dtype == torch.float64 and case != "overflowing" else 1e-6
        updates.assert_same(ours, alone, tolerance, f"{strategy} {case}")
        assert ours["kept"].keys() == alone["kept"].keys()
        for name, value in alone["kept"].items():
            torch.testing.assert_close(ours["kept"][name], value, rtol=0, atol=tolerance)


def test_ascents_send_nothing_but_parameters(found: list[dict[str, Any]]) -> None:
    for strategy in ("ddp", "fairscale_sdp"):
        assert found[0][f"{strategy}/sent"] == {}
    for strategy in ("fsdp", "fairscale_fsdp"):
        assert found[0][f"{strategy}/sent"].keys() == {"other"}
        assert found[0][f"{strategy}/sent"]["other"] > 0
