"""A study whose runs are job arrays of a real SLURM: its numbers are those of the study that ran here."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from shapes_runs import SHAPES, Environment, wait_for

from villa.cli.run import main
from villa.studies.study import Study

RECIPE = f"""\
name: Shapes
output_dir: nowhere
recipe: {SHAPES}.yaml
options:
  user_dir: {SHAPES}
  training: {{epochs: null}}
  evaluation: {{every: 2}}
  logging: {{figures: false, tensorboard: false, progress: "off"}}
seeds: [1]
updates: 2
match_compute: villa
methods: {{standard: {{trainer: standard}}, villa: {{trainer: villa}}}}
robustness: {{attacks: [fgm], radii: [0.1], checks: false, examples: 20, modalities: [text]}}
"""
QUEUE = ("launcher=slurm", "launcher.timeout_min=30")

pytestmark = pytest.mark.slow


def test_a_study_in_a_queue_has_the_numbers_of_one_here(slurm: Environment, tmp_path: Path) -> None:
    recipe, here, queued = tmp_path / "study.yaml", tmp_path / "here", tmp_path / "queued"
    recipe.write_text(RECIPE)
    study = Study(str(recipe), [f"output_dir={here}"])
    for phase in (study.training, study.attacks):
        sweep = phase()
        assert sweep is not None
        assert [main(run.arguments) for run in sweep.runs] == [0] * 3
    study.report()

    command = [sys.executable, "-m", "villa.cli.run", "--study", str(recipe), f"output_dir={queued}", *QUEUE]
    for place in ("runs", "attacks"):
        said = subprocess.run(command, capture_output=True, text=True, env={**slurm}, check=True).stdout
        assert re.search(r"^submitted job array \d+ of 3 runs$", said, re.MULTILINE)
        assert "the jobs are in the queue; the same command goes on when they have ended" in said
        wait_for(lambda place=place: len(list((queued / place).glob("*/finished.json"))) == 3, 300)  # type: ignore[misc]
    subprocess.run(command, capture_output=True, env={**slurm}, check=True)
    assert (queued / "study.csv").read_text() == (here / "study.csv").read_text()
    assert (queued / "study.md").read_text() == (here / "study.md").read_text()
