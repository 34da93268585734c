"""Sweeps whose runs a queue takes: what is in it or done is not handed over again."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import shapes  # noqa: F401 - registers the example project's classes

from villa.cli.run import main
from villa.launch.base import LauncherConfig, Queue, Request
from villa.registry import LAUNCHERS, register_launcher

RECIPE = [
    *("model=average", "model.hidden_size=8", "dataset=shapes", "dataset.examples=32", "batch.examples=8"),
    *(
        "training.updates=2",
        "logging.tensorboard=false",
        "logging.figures=false",
        "logging.progress=off",
        "launcher=waiting",
    ),
]
SWEEP = ["--sweep", "optimizer.lr=0.01,0.1", "seed=1,2", "--at-once", "3"]


class Waiting(Queue):
    """A queue in memory whose jobs run when they are told to."""

    jobs: ClassVar[dict[str, Request]] = {}
    arrays: ClassVar[list[tuple[int, int | None]]] = []
    follow = False
    Config = LauncherConfig

    def launch(self, request: Request) -> int:
        raise NotImplementedError

    def submit(self, requests: Sequence[Request], folder: Path, at_once: int | None) -> list[str]:
        self.arrays.append((len(requests), at_once))
        made = {f"{len(self.arrays)}_{number}": request for number, request in enumerate(requests)}
        self.jobs.update(made)
        return list(made)

    def alive(self) -> frozenset[str]:
        if self.follow and self.jobs:  # time passes
            start(next(iter(self.jobs)))
        return frozenset(self.jobs)


def start(number: str) -> None:
    request = Waiting.jobs.pop(number)
    if "optimizer.lr=0.1" not in request.arguments or "seed=2" not in request.arguments:
        assert main(request.inner) == 0


@pytest.fixture(autouse=True)
def queue(monkeypatch: pytest.MonkeyPatch) -> type[Waiting]:
    monkeypatch.setattr("villa.sweeps.running._PAUSE", 0.0)
    monkeypatch.setattr(Waiting, "jobs", {})
    monkeypatch.setattr(Waiting, "arrays", [])
    if "waiting" not in LAUNCHERS.names():
        register_launcher("waiting")(Waiting)
    return Waiting


def sweep(folder: Path, *extra: str) -> int:
    return main([*RECIPE, f"output_dir={folder}", *(extra or SWEEP)])


def test_nothing_is_handed_over_twice(
    queue: type[Waiting], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert sweep(folder) == 0
    assert "submitted job array 1 of 4 runs, at most 3 at once" in capsys.readouterr().out
    assert not (folder / "table.csv").exists()
    assert json.loads((folder / "jobs.json").read_text())["lr=0.1,seed=1"] == "1_2"
    assert sweep(folder) == 0
    assert queue.arrays == [(4, 3)]
    assert "4 of the runs are in the queue already" in capsys.readouterr().out
    start("1_0")
    queue.jobs.pop("1_1")  # it was cancelled
    assert sweep(folder) == 0
    assert queue.arrays == [(4, 3), (1, 3)]
    printed = capsys.readouterr().out
    assert "sweep of 4 runs" in printed
    assert ": 1 done" in printed
    assert "submitted job 2 of 1 run, at most 3 at once" in printed
    assert "1 of 2" in (folder / "table.md").read_text()
    for number in list(queue.jobs):
        start(number)
    monkeypatch.setattr(Waiting, "check", lambda *given: pytest.fail("what is done needs no queue"), raising=False)
    assert sweep(folder, "--sweep", "optimizer.lr=0.01", "seed=1,2") == 0
    assert len(queue.arrays) == 2
    assert "2 of 2" in (folder / "table.md").read_text()


def test_followed_runs_are_named_as_they_end(
    queue: type[Waiting], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Waiting, "follow", True)
    folder = tmp_path / "out"
    assert sweep(folder) == 1
    printed = capsys.readouterr().out
    assert "1 of 4 lr=0.01,seed=1: done, accuracy " in printed
    assert f"4 of 4 lr=0.1,seed=2: failed, see {folder}/lr=0.1,seed=2/jobs\n" in printed
    assert (folder / "figure.png").exists()


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        (["--sweep", "seed=1,2", "--at-once", "0"], "--at-once 0 is too few"),
        (["--sweep", "launcher=inline,waiting"], "--sweep varies launcher"),
        (["--sweep", "launcher=waiting,inline"], "--sweep varies launcher"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_submitted(
    extra: list[str], problem: str, queue: type[Waiting], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path / "out", *extra) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line
    assert not queue.arrays
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[]", '{"seed=1": 7}', "{"])
def test_a_damaged_note_of_jobs_is_one_line(
    content: str, queue: type[Waiting], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jobs.json").write_text(content)
    assert sweep(tmp_path, "--sweep", "seed=1,2") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "remove it if no job of this sweep is in the queue" in line
    assert not queue.arrays
