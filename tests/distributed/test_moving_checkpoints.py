"""Sharded checkpoints of two processes: to the bit, moved between strategies, killed while they are written."""

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pair
import pytest
import torch
from test_processes_of_runs import SHORT, printed

from villa.checkpoints.layout import CHECKPOINTS
from villa.checkpoints.store import CheckpointStore, load

SHARDED, BACKGROUND = "checkpoint.sharded=true", "checkpoint.asynchronous=true"
RUN = (
    *SHORT,
    *("evaluation.split=null", "run_type=train", "training.ema=0.5"),
    *("checkpoint.every=1", "checkpoint.resume=true"),
)


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    with pair.server() as made:
        yield made


def go(context: Any, folder: Path, updates: int, strategy: str, count: int, *options: str) -> None:
    options = (*RUN, f"training.updates={updates}", f"distributed.strategy={strategy}", *options)
    codes = pair.in_processes(context, pair.recipe, str(folder), *options, count=count)
    assert codes == [0] * count, printed(folder) + printed(folder, count - 1)


@pytest.fixture(scope="module")
def whole(context: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four updates of two processes that have a part of everything, saved whole."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    go(context, folder, 4, "fsdp", 2)
    return folder


def tensors(folder: Path, update: int) -> dict[str, Any]:
    """Weights, their average, and moments of a checkpoint by name."""
    checkpoint = load(CheckpointStore(folder / CHECKPOINTS, keep=1).path(update))
    updater = checkpoint.training_state()["updater"]
    state, average = updater["optimizer"], updater["average"]["weights"]["ema"]
    names = [name for group in state["param_groups"] for name in group["names"]]
    moments = {f"{names[i]}.{key}": value for i, kept in state["state"].items() for key, value in kept.items()}
    return checkpoint.model_state() | moments | {f"{name}.average": value for name, value in average.items()}


def assert_equal(folder: Path, other: Path, update: int, tolerance: float = 0.0) -> None:
    ours, theirs = tensors(folder, update), tensors(other, update)
    assert len(theirs) == 5 * sum(name.endswith("exp_avg") for name in theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_shards_written_in_the_background_and_a_resume_from_them_are_the_same_to_the_bit(
    context: Any, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    go(context, folder, 2, "fsdp", 2, SHARDED, BACKGROUND)
    go(context, folder, 4, "fsdp", 2, SHARDED, BACKGROUND)
    assert "resuming after update 2" in printed(folder)
    assert "not to the bit" not in printed(folder)
    for update in (1, 2, 3, 4):
        path = folder / CHECKPOINTS / f"update_{update:08d}"
        assert len(list((path / "shards").iterdir())) == 2
        assert not (path / "model.safetensors").exists()
        assert_equal(folder, whole, update)
    sizes = [file.stat().st_size for file in (path / "shards").iterdir()]
    assert max(sizes) < 0.6 * sum(sizes)


def test_a_run_moves_between_strategies_by_shards(context: Any, whole: Path, tmp_path: Path) -> None:
    """One update each, saved in shards or whole, read by the next one; rounding aside, nothing changes."""
    folder = tmp_path / "run"
    places = (("fsdp", 2, True), ("single", 1, True), ("ddp", 2, True), ("fsdp", 1, False))
    for update, (strategy, count, sharded) in enumerate(places, 1):
        go(context, folder, update, strategy, count, f"checkpoint.sharded={str(sharded).lower()}", BACKGROUND)
        assert_equal(folder, whole, update, tolerance=1e-4)
    said = printed(folder)
    assert said.count("resuming after update") == 3
    assert said.count("  changed since: number of processes: 2 -> 1\n") == 2
    assert said.count("  changed since: number of processes: 1 -> 2\n") == 1
    assert said.count("  not to the bit as if nothing had changed: sums over processes are rounded") == 3
    assert "not the same updates" not in said  # batch.per_pass is given


def test_what_a_method_keeps_of_weights_moves_with_the_run(context: Any, tmp_path: Path) -> None:
    """Each process has its parts of an average of weights, and the next run other parts."""
    folder, straight = tmp_path / "run", tmp_path / "straight"
    places = (("fsdp", 2, SHARDED), ("single", 1, SHARDED), ("fairscale_fsdp", 2, BACKGROUND), ("fsdp", 2, BACKGROUND))
    for update, (strategy, count, option) in enumerate(places, 1):
        go(context, folder, update, strategy, count, "trainer=averaging", option)
    go(context, straight, 4, "single", 1, "trainer=averaging")
    ours, theirs = (load(CheckpointStore(run / CHECKPOINTS, keep=1).path(4)) for run in (folder, straight))
    weights = ours.model_state()
    for part, word, count in (("trainer", "average", {"seen": 4}), ("average", "ema", {"updates": 4})):
        kept, expected = (checkpoint.training_state()["updater"][part] for checkpoint in (ours, theirs))
        assert kept["state"] == expected["state"] == count
        torch.testing.assert_close(kept["weights"], expected["weights"], rtol=0, atol=1e-4)
        assert any((value - weights[name]).abs().max() > 1e-3 for name, value in kept["weights"][word].items())
    torch.testing.assert_close(ours.averaged_state(), theirs.averaged_state(), rtol=0, atol=1e-4)


def die(folder: str, rank: int, operation: int, *options: str) -> None:
    """Run the recipe; one of the processes dies just before a file operation on an unfinished checkpoint."""
    operations = itertools.count()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        here = event in ("open", "os.mkdir", "os.rename", "os.chmod") and ".saving-" in str(arguments[0])
        if here and next(operations) == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == str(rank):
        sys.addaudithook(hook)
    pair.recipe(folder, *options)


@pytest.mark.parametrize(
    ("rank", "operation"),
    [(1, 4), pytest.param(0, 25, marks=pytest.mark.slow), pytest.param(1, 9, marks=pytest.mark.slow)],
)
def test_a_process_killed_while_its_shard_is_written_leaves_what_was_complete(
    context: Any, whole: Path, tmp_path: Path, rank: int, operation: int
) -> None:
    folder = tmp_path / "run"
    options = (*RUN, "training.updates=4", "distributed.strategy=fsdp", SHARDED, BACKGROUND)
    codes = pair.in_processes(context, die, str(folder), rank, operation, *options)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] not in (0, None)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    store = CheckpointStore(copy / CHECKPOINTS, keep=9)
    store.clean()
    assert len(store.updates()) < 4
    for update in store.updates():
        assert_equal(copy, whole, update)
    go(context, folder, 4, "fsdp", 2, SHARDED)
    assert_equal(folder, whole, 4)
