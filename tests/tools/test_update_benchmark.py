"""The benchmarks of updates at a tiny size, for what they compute; times are not asserted."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def benchmark(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    folder = root / "tools" / "benchmarks"

    def run(*options: str) -> list[list[str]]:
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setattr(sys, "argv", ["updates.py", "--size", "tiny", "--examples", "4", *options])
        runpy.run_path(str(folder / "updates.py"), run_name="__main__")
        return [[cell.strip() for cell in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines()[2:]]

    return run


def test_gradients_are_those_of_the_published_loop(benchmark) -> None:  # type: ignore[no-untyped-def]
    rows = benchmark("--check", "--method", "standard", "alternating", "--padding", "0.3")
    assert [row[1] for row in rows] == ["standard", "alternating"]
    assert all(float(row[-1]) < 1e-6 for row in rows)


@pytest.mark.parametrize("task", ["vcr", "nlvr2"])
def test_so_are_those_of_several_texts_or_images(benchmark, task: str) -> None:  # type: ignore[no-untyped-def]
    ((*_, apart),) = benchmark("--check", "--task", task, "--method", "alternating", "--padding", "0.3")
    assert float(apart) < 1e-6


def test_updates_are_timed_and_counted(benchmark) -> None:  # type: ignore[no-untyped-def]
    reference, villa = benchmark("--method", "text", "--rounds", "1")
    assert [reference[5], villa[5]] == ["reference", "villa"]
    assert reference[6] == reference[7] == reference[10] == "1.00"
    assert float(villa[10]) < 1  # one clean backward instead of three
    assert float(villa[9]) > 0


def test_two_processes_halve_the_operations_of_each(root: Path) -> None:
    command = [sys.executable, "tools/benchmarks/scaling.py", "--size=tiny", "--rounds=1", "--factor", "processes"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    one, two = ([cell.strip() for cell in row.split("|")[1:-1]] for row in done.stdout.splitlines()[-2:])
    assert [one[:2], two[:2]] == [["processes", "1"], ["processes", "2"]]
    assert 0.4 < float(two[-1]) < 0.7  # the halves differ in padding
