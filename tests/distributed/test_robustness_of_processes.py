"""Attacks by two processes find what one finds."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pair
import pytest

SHORT = ("training.updates=6", "evaluation.every=null", "checkpoint.every=null", "checkpoint.resume=false")
ATTACK = (
    *("robustness.steps=4", "robustness.examples=41", "robustness.restarts=1", "robustness.radii=[0.1,0.5]"),
    "robustness.attacks=[noise,fgm,pgd,apgd,universal]",
)


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    with pair.server() as made:
        yield made


def attacked(context: Any, folder: Path, run: Path, *options: str, count: int) -> Path:
    given = ("checkpoint.resume=false", "run_type=robustness", f"checkpoint.path={run}", *ATTACK, *options)
    assert pair.in_processes(context, pair.recipe, str(folder), *given, count=count) == [0] * count, Path(
        f"{folder}.0.out"
    ).read_text()
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_find_what_one_finds(context: Any, tmp_path: Path, strategy: str) -> None:
    run = tmp_path / "run"
    assert pair.in_processes(context, pair.recipe, str(run), *SHORT, count=1) == [0]
    alone = attacked(context, tmp_path / "alone", run, count=1)
    both = attacked(context, tmp_path / "both", run, f"distributed.strategy={strategy}", count=2)
    lines = [(folder / "robustness_examples.jsonl").read_text() for folder in (alone, both)]
    assert lines[0] == lines[1]
    assert lines[0].count("\n") == 41 * 3
    found, expected = (json.loads((folder / "robustness.json").read_text()) for folder in (both, alone))
    for one, other in zip(found["attacks"], expected["attacks"], strict=True):
        assert one["score"] == other["score"]
        assert one["success_on_correct"] == other["success_on_correct"]
    assert any(entry["success_on_correct"] for entry in found["attacks"])
