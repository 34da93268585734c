"""Runs of two processes of which one is killed, or told to end: how the other learns of it, and how they go on."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import pair
import pytest

#: Two micro-batches for each process, three validations of two batches, and a test.
RECIPE = (
    "training.updates=30",
    "evaluation.every=10",
    "evaluation.examples=25",
    "checkpoint.every=3",
    "distributed.strategy=ddp",
)
RESULTS = ("log.jsonl", "predictions_test.jsonl")


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    with pair.server() as made:
        yield made


def printed(folder: Path, rank: int) -> str:
    return Path(f"{folder}.{rank}.out").read_text()


def left(folder: Path) -> dict[str, bytes]:
    """What a run leaves that does not depend on the time."""
    files = [folder / "checkpoints/update_00000030/model.safetensors", *(folder / name for name in RESULTS)]
    scores = json.loads((folder / "metrics.json").read_text())
    del scores["protocol"]["provenance"]  # a commit in between is not what is tested here
    return {path.name: path.read_bytes() for path in files} | {"metrics.json": json.dumps(scores).encode()}


@pytest.fixture(scope="module")
def whole(context: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert pair.in_processes(context, pair.recipe, str(folder), *RECIPE) == [0, 0], printed(folder, 0)
    return left(folder)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_killed_is_named_by_the_other_at_once_and_the_next_start_goes_on(
    rank: int, context: Any, whole: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    where = "checkpoints/update_00000003"
    codes = pair.in_processes(context, pair.recipe_until, str(folder), rank, signal.SIGKILL, where, *RECIPE)
    assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, 1), printed(folder, 1 - rank)
    (line,) = (text for text in printed(folder, 1 - rank).splitlines() if "error" in text)
    assert line.startswith(f"villa_run: error: process {rank} of 2 (pid ")
    assert line.endswith("was lost: it was killed, or its machine is gone; go on with checkpoint.resume=true")
    assert pair.in_processes(context, pair.recipe, str(folder), *RECIPE) == [0, 0], printed(folder, 0)
    assert "resuming after update" in printed(folder, 0)
    assert left(folder) == whole


@pytest.mark.parametrize("rank", [0, 1])
def test_those_that_are_killed_before_all_have_met_are_named_after_a_while(
    rank: int, context: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    codes = pair.in_processes(context, faults.meet, str(folder), rank, count=3)
    present = {0, 1, 2} - {rank}
    assert {codes[number] for number in present} == {2}
    assert codes[rank] == -signal.SIGKILL
    said = [line for number in present for line in printed(folder, number).splitlines() if "error" in line]
    assert all("of 3 cannot meet the others at 127.0.0.1:" in line for line in said), said
    if rank:
        assert [line.split(":", 4)[4].split(";")[0] for line in said] == [
            " TimeoutError: those of rank 1 have not come within 12 s (VILLA_START_TIMEOUT)"
        ]
    else:
        assert len(said) == 2  # each by itself: nobody keeps common notes


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_ends_both_at_the_same_place(
    rank: int, context: Any, whole: dict[str, bytes], tmp_path: Path
) -> None:
    folder, where = tmp_path / "run", "checkpoints/update_00000006"
    codes = pair.in_processes(context, pair.recipe_until, str(folder), rank, signal.SIGTERM, where, *RECIPE)
    assert codes == [128 + signal.SIGTERM] * 2, printed(folder, 0)
    assert "ended by SIGTERM after update" in printed(folder, 0)
    assert pair.in_processes(context, pair.recipe, str(folder), *RECIPE) == [0, 0], printed(folder, 0)
    assert left(folder) == whole


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "fairscale_fsdp", "fairscale_sdp"])
def test_an_update_is_left_without_a_trace_where_the_model_is_shared(
    strategy: str, context: Any, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    recipe = (*RECIPE, f"distributed.strategy={strategy}")
    where = "checkpoints/update_00000006"
    codes = pair.in_processes(context, pair.recipe_until, str(cut), 1, signal.SIGTERM, where, *recipe)
    assert codes == [128 + signal.SIGTERM] * 2, printed(cut, 0)
    for folder in (whole, cut):
        assert pair.in_processes(context, pair.recipe, str(folder), *recipe) == [0, 0], printed(folder, 0)
    assert left(cut) == left(whole)
