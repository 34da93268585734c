"""Attacks by two processes find what one finds."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pair
import pytest
from killing import PROJECT
from tiny_runs import colours

from villa.cli.run import main

SHORT = ("training.updates=6", "evaluation.every=null", "checkpoint.every=null", "checkpoint.resume=false")
ATTACK = (
    *("robustness.steps=4", "robustness.examples=41", "robustness.restarts=1", "robustness.radii=[0.1,0.5]"),
    "robustness.attacks=[noise,fgm,pgd,apgd,universal]",
)


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    with pair.server() as made:
        yield made


def on_words(context: Any, folder: Path, run: Path, *options: str, count: int) -> Path:
    given = (f"user_dir={PROJECT / 'shapes'}", "run_type=robustness", f"checkpoint.path={run}", "robustness.examples=7")
    attacks = ("robustness.attacks=[misspelling,hotflip]", "robustness.text.similarity=-1", "robustness.checks=false")
    shifts = ("robustness.shifts=[char_noise,synonyms]", "logging.progress=off")
    every = (*given, *attacks, *shifts, *options)
    assert pair.in_processes(context, pair.command, str(folder), *every, count=count) == [0] * count, Path(
        f"{folder}.0.out"
    ).read_text()
    return folder


def test_processes_that_share_weights_find_the_same_words(context: Any, tmp_path: Path) -> None:
    assert main([*colours(tmp_path), "training.updates=6", f"output_dir={tmp_path / 'run'}"]) == 0
    alone = on_words(context, tmp_path / "alone", tmp_path / "run", count=1)
    for strategy in ("ddp", "fsdp"):
        both = on_words(
            context, tmp_path / strategy, tmp_path / "run", f"distributed.strategy={strategy}", "device=cpu", count=2
        )
        name = "robustness_examples.jsonl"
        assert (both / name).read_text() == (alone / name).read_text()
        found, expected = (json.loads((folder / "robustness.json").read_text()) for folder in (both, alone))
        assert found["shifts"] == expected["shifts"]
        assert [one["forwards"] for one in found["attacks"]] == [one["forwards"] for one in expected["attacks"]]


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
