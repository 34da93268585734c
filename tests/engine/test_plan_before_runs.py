"""The plan that a run prints before it starts, which changes nothing of the run."""

import re
from pathlib import Path

import pytest
import torch
from tiny_runs import run
from torch import nn

from villa.planning.meta import meta_copy

#: Perturbations are drawn.
RANDOM = ("trainer=villa", "trainer.init=normal")
FILES = ("log.jsonl", "metrics.json", "predictions_test.jsonl", "checkpoints/update_00000004/model.safetensors")


def test_a_run_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run") == 0
    output = capsys.readouterr().out
    assert re.search(r"^  parameters: \S+.* trained, ", output, re.MULTILINE)
    assert re.search(
        r"^  memory of a rank \(one process\): parameters .*, optimiser .*, activations ", output, re.MULTILINE
    )
    assert re.search(r"^  compute of an update: .*FLOP in 1 micro-batch$", output, re.MULTILINE)


def test_the_plan_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path / "planned", *RANDOM) == 0
    monkeypatch.setattr("villa.engine.train.plan_of_run", lambda *given: [])
    assert run(tmp_path / "unplanned", *RANDOM) == 0
    for name in FILES:
        assert (tmp_path / "planned" / name).read_bytes() == (tmp_path / "unplanned" / name).read_bytes(), name


def test_running_the_copy_leaves_what_layers_count() -> None:
    layer = nn.BatchNorm1d(3)
    copied = meta_copy(layer)
    copied.num_batches_tracked += 1
    assert layer.num_batches_tracked == 0
    assert copied.running_mean.device == torch.device("meta")
