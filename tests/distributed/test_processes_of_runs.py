"""Whole runs on two processes: what they write, how they end, and how they go on."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pair
import pytest
import torch
from safetensors.torch import load_file

#: Four micro-batches an update; validation and test splits that two processes cannot share evenly.
SHORT = (
    "training.updates=6",
    "evaluation.every=3",
    "evaluation.examples=100",
    "logging.every=2",
    "checkpoint.every=2",
    "checkpoint.keep=9",
    "checkpoint.resume=false",
    "scheduler=constant",
)


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    with pair.server() as made:
        yield made


@pytest.fixture(scope="module")
def alone(context: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert pair.in_processes(context, pair.recipe, str(folder), *SHORT, count=1) == [0], printed(folder)
    return folder


def printed(folder: Path, rank: int = 0) -> str:
    return Path(f"{folder}.{rank}.out").read_text()


def weights(folder: Path, update: int = 6) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"update_{update:08d}" / "model.safetensors")


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions_test.jsonl").read_text().splitlines()]


def assert_alike(folder: Path, other: Path) -> None:
    """The same but for rounding in fp32: weights, log, predictions in the order of the split, scores."""
    for name, value in weights(other).items():
        torch.testing.assert_close(weights(folder)[name], value, rtol=0, atol=1e-4)
    assert len(log(folder)) == len(log(other))
    for ours, theirs in zip(log(folder), log(other), strict=True):
        assert ours.pop("kind") == theirs.pop("kind")
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-4)
    for ours, theirs in zip(predictions(folder), predictions(other), strict=True):
        assert (ours["id"], ours["answer"]) == (theirs["id"], theirs["answer"])
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-3)
    scores = [json.loads((run / "metrics.json").read_text())["test"] for run in (folder, other)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_write_what_one_does(strategy: str, context: Any, alone: Path, tmp_path: Path) -> None:
    folder, option = tmp_path / "run", f"distributed.strategy={strategy}"
    assert pair.in_processes(context, pair.recipe, str(folder), *SHORT, option) == [0, 0], printed(folder)
    assert_alike(folder, alone)
    assert f"on 2 processes ({strategy})" in printed(folder)
    assert printed(folder, 1) == ""


def test_a_run_goes_on_under_any_other_strategy(context: Any, alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for strategy, count, updates in (("single", 1, 2), ("ddp", 2, 4), ("fsdp", 2, 5), ("single", 1, 6)):
        options = (f"distributed.strategy={strategy}", f"training.updates={updates}", "checkpoint.resume=true")
        codes = pair.in_processes(context, pair.recipe, str(folder), *SHORT, *options, count=count)
        assert codes == [0] * count, printed(folder)
    assert printed(folder).count("resuming after update") == 3
    for name, value in weights(alone).items():
        torch.testing.assert_close(weights(folder)[name], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_resumed_run_of_as_many_processes_is_the_same_to_the_bit(strategy: str, context: Any, tmp_path: Path) -> None:
    runs = [tmp_path / "whole", tmp_path / "resumed"]
    for folder, lengths in zip(runs, ((4,), (2, 4)), strict=True):
        for updates in lengths:
            options = (f"distributed.strategy={strategy}", f"training.updates={updates}", "checkpoint.resume=true")
            assert pair.in_processes(context, pair.recipe, str(folder), *SHORT, *options) == [0, 0], printed(folder)
    whole, resumed = (weights(folder, 4) for folder in runs)
    assert all(value.equal(resumed[name]) for name, value in whole.items())


def test_several_processes_for_one_are_refused_in_one_line(context: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert pair.in_processes(context, pair.recipe, str(folder), *SHORT) == [2, 2]
    (said,) = re.findall("error: .*", printed(folder) + printed(folder, 1))
    assert said.startswith("error: distributed.strategy is 'single', but 2 processes were started")
    assert not folder.exists()


def test_an_error_on_one_process_ends_all(context: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.json").write_text("{}")  # what the main process alone looks at
    assert pair.in_processes(context, pair.recipe, str(folder), *SHORT, "distributed.strategy=ddp") == [2, 2]
    assert "already holds a run" in printed(folder)
    assert printed(folder, 1) == ""
