"""What processes hold and need at most, measured, against the plan."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

MODEL = ["model.num_layers=2", "model.hidden_size=192"]
Measured = Callable[..., dict[str, int]]


@pytest.fixture
def measured(root: Path, monkeypatch: pytest.MonkeyPatch) -> Measured:
    """Measure a case of the benchmark in so many new processes, whatever this one has loaded."""
    monkeypatch.syspath_prepend(str(root / "tools" / "benchmarks"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import memory

    def case(processes: int, *options: str) -> dict[str, int]:
        given = {"tokens": 20, "regions": 36, "optimizer": "bert_adamw", "others": [*MODEL, *options]}
        found: dict[str, int] = memory.case("freelb", 8, "fsdp", processes, argparse.Namespace(**given))
        return found

    return case


@pytest.mark.slow
def test_two_processes_hold_half_each_and_need_what_is_planned(measured: Measured) -> None:
    one, two = measured(1), measured(2)
    each_pass = measured(2, "distributed.reduce_each_pass=true")
    for kind in ("parameters", "gradients", "optimizer"):
        assert two[kind] == pytest.approx(one[kind] / 2, rel=0.01)
        assert each_pass[kind] == two[kind]
    assert two["planned_parameters"] == pytest.approx(two["parameters"], rel=0.01)
    for found in (one, two, each_pass):
        assert found["planned"] == pytest.approx(found["measured"], rel=0.2)
    assert each_pass["measured"] < two["measured"]  # whole gradients in one of them
