"""What processes hold and need at most, measured, against the plan."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = ["model.num_layers=2", "model.hidden_size=192"]
SCRIPT = """
import argparse, json, sys
sys.path.insert(0, "tools/benchmarks")
import memory
options = argparse.Namespace(**json.loads(sys.argv[2]))
print(json.dumps(memory.case("freelb", 8, "fsdp", int(sys.argv[1]), options)))
"""


def measured(root: Path, processes: int, *options: str) -> dict[str, int]:
    given = {"tokens": 20, "regions": 36, "optimizer": "bert_adamw", "others": [*MODEL, *options]}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(processes), json.dumps(given)]
    done = subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_two_processes_hold_half_each_and_need_what_is_planned(root: Path) -> None:
    one, two = measured(root, 1), measured(root, 2)
    each_pass = measured(root, 2, "distributed.reduce_each_pass=true")
    for kind in ("parameters", "gradients", "optimizer"):
        assert two[kind] == pytest.approx(one[kind] / 2, rel=0.01)
        assert each_pass[kind] == two[kind]
    assert two["planned_parameters"] == pytest.approx(two["parameters"], rel=0.01)
    for found in (one, two, each_pass):
        assert found["planned"] == pytest.approx(found["measured"], rel=0.2)
    assert each_pass["measured"] < two["measured"]  # whole gradients in one of them
