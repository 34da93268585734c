"""A run that is killed at any moment and started again ends with the same bytes as one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import killing
import pytest
from forks import server
from safetensors.torch import load_file

#: What must be the same to the byte.
RESULTS = ("log.jsonl", "metrics.json", "predictions_test.jsonl", "config.yaml")


@pytest.fixture(scope="module")
def forks() -> Any:
    """Starts runs in processes that have everything imported, so that a kill hits training, not imports."""
    with server("killing") as context:
        yield context


def start(forks: Any, folder: Path, *extra: str) -> Any:
    process = forks.Process(target=killing.run, args=(str(folder), *extra))
    process.start()
    return process


def finish(forks: Any, folder: Path, *extra: str) -> int:
    process = start(forks, folder, *extra)
    process.join(600)
    return int(process.exitcode)


@pytest.fixture(scope="module")
def uninterrupted(forks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert finish(forks, folder) == 0, folder.with_suffix(".out").read_text()
    return folder


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("update_*"))


def assert_same(a: Path, b: Path) -> None:
    for name in RESULTS:
        mine, theirs = ((f / name).read_bytes().replace(str(f).encode(), b"") for f in (a, b))
        assert mine == theirs, name
    assert sorted(p.name for p in (a / "checkpoints").iterdir()) == sorted(
        p.name for p in (b / "checkpoints").iterdir()
    )
    assert (newest(a) / "model.safetensors").read_bytes() == (newest(b) / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_kill_at_random_moments_twenty_times_and_more(forks: Any, uninterrupted: Path, tmp_path: Path) -> None:
    draw = random.Random(7)
    folder, kills = tmp_path / "run0", 0

    def resumed() -> int:
        return sum(file.read_text().count("resuming after update") for file in tmp_path.glob("*.out"))

    while kills < 24 or resumed() < 10:  # on a busy machine many are killed before their first checkpoint
        process = start(forks, folder)
        process.join(draw.uniform(0.05, max(1.2, kills / 20)))  # longer where that is too short
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:  # it got through between two kills: compare it and go on with a new one
            assert process.exitcode == 0, folder.with_suffix(".out").read_text()
            assert_same(folder, uninterrupted)
            folder = tmp_path / f"run{kills}"
        assert kills < 500
    assert finish(forks, folder) == 0, folder.with_suffix(".out").read_text()
    assert_same(folder, uninterrupted)
    assert resumed() >= 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_ends_in_order_and_the_run_goes_on(
    forks: Any, uninterrupted: Path, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    process = start(forks, folder, "checkpoint.every=1000")
    while process.is_alive() and not (folder / "log.jsonl").exists():
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(600)
    assert process.exitcode == 128 + number, folder.with_suffix(".out").read_text()
    assert f"ended by {number.name} after update" in folder.with_suffix(".out").read_text()
    update = int(newest(folder).name.removeprefix("update_"))
    assert 0 < update < 60
    assert finish(forks, folder) == 0
    assert load_file(newest(folder) / "model.safetensors").keys()
    for name in ("log.jsonl", "predictions_test.jsonl"):
        assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_a_damaged_newest_checkpoint_is_reported_and_the_previous_one_used(
    forks: Any, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert finish(forks, folder, "training.updates=30") == 0
    damaged = newest(folder) / "training_state.pt"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert finish(forks, folder) == 0
    output = folder.with_suffix(".out").read_text()
    assert f"checkpoint '{damaged.parent}' is damaged: {damaged.name} has" in output
    assert "resuming after update 27" in output


def test_resuming_a_finished_run_changes_nothing(forks: Any, uninterrupted: Path) -> None:
    before = {name: (uninterrupted / name).read_bytes() for name in RESULTS}
    assert finish(forks, uninterrupted) == 0
    assert before == {name: (uninterrupted / name).read_bytes() for name in RESULTS}


def test_changed_options_are_named_on_resume(forks: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert finish(forks, folder, "training.updates=6") == 0
    assert finish(forks, folder, "training.updates=9", "optimizer.lr=0.02") == 0
    output = folder.with_suffix(".out").read_text()
    assert "changed since: optimizer.lr: 0.01 -> 0.02" in output
    assert "changed since: training.updates: 6 -> 9" in output


def test_every_checkpoint_damaged_is_an_error_and_nothing_is_lost(forks: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert finish(forks, folder, "training.updates=6") == 0
    for file in folder.glob("checkpoints/*/model.safetensors"):
        file.write_bytes(b"")
    assert finish(forks, folder) == 2
    assert "every checkpoint" in folder.with_suffix(".out").read_text()


def test_a_used_folder_is_refused_and_one_in_use_too(forks: Any, uninterrupted: Path, tmp_path: Path) -> None:
    assert finish(forks, uninterrupted, "checkpoint.resume=false") == 2
    assert "already holds a run" in uninterrupted.with_suffix(".out").read_text()
    folder = tmp_path / "run"
    first = start(forks, folder, "training.updates=2000")
    while first.is_alive() and not (folder / "log.jsonl").exists():
        time.sleep(0.01)
    assert finish(forks, folder) == 2
    assert "in use by another process" in folder.with_suffix(".out").read_text()
    first.kill()
    first.join()


@pytest.mark.slow
def test_the_command_itself_killed_and_started_again(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "villa.cli.run", *killing.RECIPE, f"output_dir={folder}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not list(folder.glob("checkpoints/update_*")):
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.wait()
    assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0
    assert_same(folder, uninterrupted)
    assert json.loads((folder / "metrics.json").read_text())["test"]["accuracy"] > 0.9
