"""The recipes for models of transformers: two commands without a network, and what is written equals what is scored."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processor_batches import tiny_folder

from villa.cli.run import main

ROOT = Path(__file__).parents[2]
#: Recipe to the architecture of its checkpoint, and the start of its files' names.
RECIPES = {
    "clip": ("clip", "captions_"),
    "fare": ("clip", "captions_"),
    "tecoa": ("clip", "classes_"),
    "siglip": ("siglip", "captions_"),
    "llava": ("llava", ""),
    "qwen2_vl": ("qwen2_vl", ""),
    "smolvlm": ("smolvlm", ""),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    script = ROOT / "projects" / "own_data" / "draw.py"
    subprocess.run([sys.executable, str(script), str(folder / "data")], check=True, capture_output=True)
    return folder


def arguments(recipe: str, work: Path, output: Path) -> list[str]:
    architecture, stem = RECIPES[recipe]
    files = [f"dataset.{split}={work}/data/{stem}{split}.jsonl" for split in ("train", "val", "test")]
    folder = tiny_folder(architecture, work)
    return [
        f"config={ROOT}/projects/huggingface/{recipe}.yaml",
        *files,
        f"model.checkpoint={folder}",
        f"output_dir={output}",
    ]


def test_all_recipes_are_here() -> None:
    assert {path.stem for path in (ROOT / "projects/huggingface").glob("*.yaml")} == RECIPES.keys()


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_recipe_runs_on_a_tiny_checkpoint(recipe: str, work: Path, tmp_path: Path) -> None:
    quick = ["training.epochs=null", "training.updates=2", "evaluation.every=null"]
    if not RECIPES[recipe][1]:
        quick += ["model.lora_rank=4", "model.freeze=[]"]
    assert main([*arguments(recipe, work, tmp_path / "run"), *quick, "logging.progress=off"]) == 0
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_what_is_written_is_what_exact_match_scores(work: Path, tmp_path: Path) -> None:
    """Greedy decoding writes the true answer exactly where every token is the likeliest after the true ones."""
    output = tmp_path / "run"
    options = ["model.lora_rank=0", "model.freeze=[]", "optimizer.lr=0.003", "trainer=standard", "batch.per_pass=null"]
    more = ["training.epochs=4", "training.precision=fp32", "evaluation.every=null", "evaluation.examples=7"]
    assert main([*arguments("llava", work, output), *options, *more, "logging.progress=off"]) == 0
    written = [json.loads(line) for line in (output / "predictions_test.jsonl").read_text().splitlines()]
    truth = [json.loads(line) for line in (work / "data" / "test.jsonl").read_text().splitlines()]
    right = sum(one["answer"] == line["answer"] for one, line in zip(written, truth, strict=True))
    metrics = json.loads((output / "metrics.json").read_text())
    assert 0 < right < len(truth)
    assert metrics["test"]["exact_match"] == pytest.approx(right / len(truth))


def test_a_hub_name_without_a_network_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "projects/huggingface/clip.yaml"
    assert main([f"config={recipe}", f"output_dir={tmp_path}/run", f"dataset.train={tmp_path}/none.jsonl"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in error if "error" in line]) == 1
