import runpy
import sys
from pathlib import Path

import pytest


def test_the_benchmark_runs_and_both_readers_read_the_same(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--examples 8 --batch 4 --batches 1 --rounds 1 --dim 64 --classes 20"
    monkeypatch.setattr(sys, "argv", ["readers.py", *options.split()])
    runpy.run_path(str(root / "tools" / "benchmarks" / "readers.py"), run_name="__main__")
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["uncompressed", "compressed"]
    assert all(row.endswith("| yes |") for row in rows)
