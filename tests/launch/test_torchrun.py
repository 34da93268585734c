"""``torchrun`` starts runs and stages, but not what starts processes itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from shapes_runs import RECIPE, SHAPES

SHORT = [*RECIPE[1:], "training.updates=2", "distributed.strategy=ddp"]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*program, "-m", "villa.cli.run", *SHORT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_stages_are_trained_by_several_processes(tmp_path: Path) -> None:
    recipe = tmp_path / "both.yaml"
    recipe.write_text(f"output_dir: {tmp_path / 'out'}\nstages: [{', '.join([f'{SHAPES}.yaml'] * 2)}]\n")
    done = torchrun(f"config={recipe}", "stage2.seed=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("on 2 processes (ddp)") == 2
    assert "stage 2 of 2" in done.stdout
    assert len(list(tmp_path.glob("out/*/finished.json"))) == 2
    assert all("test" in json.loads(path.read_text()) for path in tmp_path.glob("out/*/metrics.json"))


@pytest.mark.parametrize("what", [["--sweep", "seed=1,2"], ["launcher=local"]])
def test_what_starts_processes_itself_is_refused_in_one_line(what: list[str], tmp_path: Path) -> None:
    done = torchrun(f"config={SHAPES}.yaml", f"output_dir={tmp_path / 'out'}", *what)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("villa_run: error: ")]
    assert "start it without torchrun" in line
    assert not (tmp_path / "out").exists()
