"""fairscale's strategies: two processes end with the parameters of one, and hold a part of what they need."""

import sys
from pathlib import Path
from typing import Any

import fairscale_updates
import pair
import pytest
import torch
import updates

from villa.config.schema import DistributedConfig
from villa.distributed.strategy import Strategy, strategy_of
from villa.errors import ConfigError


@pytest.fixture(scope="module")
def context() -> Any:
    with pair.server() as made:
        yield made


@pytest.fixture(scope="module")
def found(context: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What came out of everything on two processes, by rank."""
    output = tmp_path_factory.mktemp("pair") / "results"
    assert pair.in_processes(context, fairscale_updates.work, str(output)) == [0, 0]
    return [torch.load(f"{output}.{rank}", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", fairscale_updates.TRIED)
def test_parameters_after_three_updates_are_those_of_one_process(name: str, found: list[dict[str, Any]]) -> None:
    _, cases, dtype = fairscale_updates.TRIED[name]
    for case in cases:
        ours, theirs = found[0][f"{name}/{case}"], fairscale_updates.run_case(Strategy(), case, dtype)
        exact = dtype == torch.float64 and case not in ("bf16", "fp16")
        tolerance = 1e-10 if exact else 1e-6
        updates.assert_same(ours, theirs, tolerance, f"{name} {case}")


def test_processes_hold_a_part_of_parameters_gradients_and_moments(found: list[dict[str, Any]]) -> None:
    for held in (ranks["fairscale_fsdp/held"] for ranks in found):
        assert held["all"] / 2 <= held["parameters"] < 0.51 * held["all"]
        assert 0.49 * held["all"] < held["gradients"] == held["moments"] < held["parameters"]  # one is never used
    first, second = (ranks["fairscale_sdp/held"] for ranks in found)
    assert first["parameters"] == first["all"]
    for kind in ("gradients", "moments"):
        assert 0.99 * first["all"] < first[kind] + second[kind] < first["all"]
        assert abs(first[kind] - second[kind]) < 0.1 * first["all"]


def test_inner_passes_and_micro_batches_reduce_nothing(found: list[dict[str, Any]]) -> None:
    for sent in found[0]["fairscale_fsdp/sent"].values():  # one part of gradients is as large as this model
        assert sum(count for name, count in sent.items() if "reduce_scatter" in name) == 1
    standard, freelb = found[0]["fairscale_sdp/sent"].values()
    assert standard == freelb
    assert standard["reduce_"] > 1


def test_gradients_of_an_earlier_pass_count_where_the_last_one_brings_none(found: list[dict[str, Any]]) -> None:
    alone = fairscale_updates.step(Strategy(), (1, 0), [fairscale_updates.values(rank) for rank in (0, 1)])
    for name in ("fairscale_sdp", "fairscale_fsdp"):
        for key, value in alone.items():
            torch.testing.assert_close(found[0][f"{name}/earlier"][key], value, rtol=0, atol=1e-6)


def test_processes_that_reach_other_parameters_are_right_or_refused(found: list[dict[str, Any]]) -> None:
    ours = found[0]["fairscale_sdp/differ"]  # the second process alone took a branch
    assert not ours["branches.1.weight"].equal(fairscale_updates.Branches().branches["1"].weight)
    assert all(value.equal(found[1]["fairscale_sdp/differ"][key]) for key, value in ours.items())
    assert found[0]["fairscale_fsdp/differ"].startswith("distributed.strategy=fairscale_fsdp: 'branches.1.weight' took")


def test_what_fairscale_cannot_do_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    used = strategy_of(DistributedConfig(strategy="fairscale_fsdp"))
    model: Any = fairscale_updates.Branches().double()
    with pytest.raises(ConfigError, match=r"fairscale_fsdp: 'layers\.0\.weight' is not in float32"):
        used.apply(model)
    model.task = "generation"
    with pytest.raises(ConfigError, match="fairscale_fsdp: Branches writes its answers word by word"):
        used.apply(model)
    monkeypatch.setitem(sys.modules, "fairscale", None)
    for name in [name for name in sys.modules if name.startswith(("fairscale.", "villa.distributed.fairscale_"))]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match="fairscale_sdp needs the package fairscale; pip install fairscale"):
        strategy_of(DistributedConfig(strategy="fairscale_sdp"))


def test_a_run_goes_on_under_any_other_strategy(context: Any, tmp_path: Path) -> None:
    from test_processes_of_runs import SHORT, printed, weights

    folders = [tmp_path / "run", tmp_path / "alone"]
    ways = [
        ("single", 1),
        ("fairscale_fsdp", 2),
        ("ddp", 2),
        ("fairscale_sdp", 2),
        ("single", 1),
        ("fairscale_fsdp", 2),
    ]
    for update, (strategy, count) in enumerate(ways, start=1):
        given = [*SHORT, f"distributed.strategy={strategy}", f"training.updates={update}", "checkpoint.resume=true"]
        codes = pair.in_processes(context, pair.recipe, str(folders[0]), *given, count=count)
        assert codes == [0] * count, printed(folders[0]) + printed(folders[0], count - 1)
    assert pair.in_processes(context, pair.recipe, str(folders[1]), *SHORT, count=1) == [0]
    for name, value in weights(folders[1]).items():
        torch.testing.assert_close(weights(folders[0])[name], value, rtol=0, atol=1e-4)
