"""Whole runs of the released training scripts, repeated from their configurations: losses, weights, predictions.

``VILLA_RELEASED_RUNS=<folder>`` compares with the runs in another folder of the same layout.
"""

import json
import lzma
import os
import re
import shutil
import tarfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from golden_compare import zero_gradient
from golden_utils import GOLDEN
from safetensors.torch import load_file
from torch import Tensor

from villa.cli.run import main
from villa.convert.configurations import read_options, released_recipe

GIVEN = os.environ.get("VILLA_RELEASED_RUNS")
FOLDER = Path(GIVEN or GOLDEN / "e2e")
CASES = sorted(
    file.parent.name if GIVEN else file.name.split(".")[0]
    for file in FOLDER.glob("*/config.json" if GIVEN else "*.tar.xz")
)
#: Largest difference of a weight: the released scripts differ from themselves by up to 7e-7 (float64, other orders).
WEIGHTS = 5e-6


@dataclass(frozen=True)
class Run:
    """A released run and its repetition.

    Attributes:
        task: ``vqa``, ``nlvr2``, ...
        folder: what the release left, unpacked; our run is in ``ours``.
        options: the released script's options.
    """

    task: str
    folder: Path
    options: dict[str, Any]

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def log(self, kind: str) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in (self.folder / "ours" / "log.jsonl").read_text().splitlines()]
        return [record for record in records if record["kind"] == kind]


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Convert the configuration, and run it where the release ran it."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    if GIVEN:
        shutil.copytree(FOLDER / request.param, folder, ignore=shutil.ignore_patterns("lock.mdb"))
    else:
        with lzma.open(FOLDER / f"{request.param}.tar.xz") as file, tarfile.open(fileobj=file) as archive:
            archive.extractall(folder, filter="data")
    task = request.param.split("_")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = read_options(Path("config.json"))
        recipe = released_recipe(task, options, read_options(Path(options["model_config"])))
        Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
        shared = [
            "config=recipe.yaml",
            "logging.every=1",
            "logging.tensorboard=false",
            "logging.figures=false",
            "logging.progress=off",
        ]
        assert main([*shared, "output_dir=ours", "device=cpu"]) == 0
        predict = ["run_type=predict", "predict.split=val", "checkpoint.path=ours", "predict.output=val.jsonl"]
        last = max(Path("ours/checkpoints").glob("update_*"))
        predict[2] = f"checkpoint.path={last}"
        assert main([*shared, *predict, "output_dir=predicted", "device=cpu"]) == 0
    return Run(task, folder, options)


def test_every_backward_pass_has_the_released_loss(run: Run) -> None:
    ours, released = run.log("train"), run.read("losses.json")["updates"]
    assert len(ours) == len(released) == run.options["num_train_steps"]
    adversarial = run.options.get("adv_training", False)
    per_loss = run.options["train_batch_size"] if run.task == "re" else 1  # the release sums over the expressions
    for mine, theirs in zip(ours, released, strict=True):
        for step in range(run.options["adv_steps"] if adversarial else 1):
            losses = [p["loss"] for p in theirs["backward_passes"] if p.get("adversarial_step", 0) == step]
            if adversarial:
                weighted = run.options["adv_kl_weight"] * mine[f"pass{step}/kl"]
                loss = (mine[f"pass{step}/loss"] + weighted) / run.options["adv_steps"]
            else:
                loss = mine["loss"]
            expected = sum(losses) / len(losses) / per_loss
            assert loss == pytest.approx(expected, rel=2e-5), (theirs["update"], step)


def test_divergences_are_those_of_the_release(run: Run) -> None:
    adversarial = run.options.get("adv_training", False)
    assert adversarial == any(name.endswith("/kl") for name in run.log("train")[0])
    for mine, theirs in zip(run.log("train"), run.read("losses.json")["updates"], strict=True):
        for step in range(run.options["adv_steps"] if adversarial else 0):
            passes = [p for p in theirs["backward_passes"] if p["adversarial_step"] == step]
            terms = [value for p in passes for name, value in p.items() if name.startswith("kl_loss")]
            expected = sum(terms) / len(terms)
            assert mine[f"pass{step}/kl"] == pytest.approx(expected, rel=2e-4, abs=3e-7), (theirs["update"], step)


def test_gradient_norms_and_learning_rates_are_those_of_the_release(run: Run) -> None:
    for mine, theirs in zip(run.log("train"), run.read("losses.json")["updates"], strict=True):
        assert mine["gradient_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-5)
        assert mine["learning_rate"] == pytest.approx(theirs["lr_per_param_group"][-1], rel=1e-9)


def test_the_final_weights_are_those_of_the_release(run: Run) -> None:
    ours = load_file(max((run.folder / "ours" / "checkpoints").glob("update_*")) / "model.safetensors")
    released, start = final_weights(run.folder), start_weights(run.folder)
    assert ours.keys() == released.keys()
    moved = max(
        float((released[name] - start[name]).abs().max()) for name in start if start[name].shape == released[name].shape
    )
    assert moved > 1e-3, "nothing was trained"
    left_out = not_compared(run.folder)
    for name, theirs in released.items():
        compared = ~zero_gradient(name, theirs)
        if any(fnmatch(name, pattern) for pattern in left_out):
            continue
        error = (ours[name] - theirs)[compared].abs()
        assert not error.numel() or error.max() <= WEIGHTS, name


def start_weights(folder: Path) -> dict[str, Tensor]:
    """The weights that the released script started from."""
    loaded: dict[str, Tensor] = torch.load(
        folder / read_options(folder / "config.json")["checkpoint"], weights_only=True
    )
    return loaded


def final_weights(folder: Path) -> dict[str, Tensor]:
    """The weights that the released script saved; in the tests, how far they moved, rounded to a millionth."""
    if (folder / "final.pt").exists():
        loaded: dict[str, Tensor] = torch.load(folder / "final.pt", weights_only=True)
        return loaded
    rounded = torch.load(folder / "final_rounded.pt", weights_only=True)
    start, moved = start_weights(folder), rounded["moved"]
    return {name: enlarged(start[name], len(value)) + value * rounded["step"] for name, value in moved.items()}


def enlarged(value: Tensor, rows: int) -> Tensor:
    """Type embeddings get further rows at the start of a released run, copies of the last."""
    return torch.cat((value, value[-1:].expand(rows - len(value), -1))) if len(value) < rows else value


def not_compared(folder: Path) -> list[str]:
    """Names of weights whose gradient is zero but for rounding, as the README of the run lists them."""
    text = (folder / "README.md").read_text()
    listed = re.search(r"Not to compare.*?Noise", text, re.DOTALL)
    assert listed is not None, "the README does not say what not to compare"
    names = re.findall(r"`([\w.*]+)`", listed[0])
    return [name for name in names if not name.endswith("in_proj_bias")]  # of these a third: see zero_gradient


def test_validation_gives_the_released_values(run: Run) -> None:
    mine = run.log("val")[-1]
    logs = [log for log in run.read("eval.json")["val_logs"] if not any("test" in name for name in log)]
    theirs = {name.removeprefix("valid/").removeprefix("val_"): value for name, value in logs[-1].items()}
    if "loss" in theirs:
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
    names = {"acc": released_metric(run.task), "acc_qa": "vcr_answer", "acc_qar": "vcr_rationale"}
    for name in theirs.keys() & names.keys():
        assert mine[names[name]] == pytest.approx(theirs[name], abs=1e-6), name
    assert theirs.keys() & (names.keys() | {"loss"})


def released_metric(task: str) -> str:
    """The metric that the released validation calls accuracy."""
    recipe = {"vqa": "soft_accuracy", "ve": "soft_accuracy", "nlvr2": "accuracy", "re": "referring", "vcr": "vcr"}
    return recipe[task]


def test_every_prediction_is_that_of_the_release(run: Run) -> None:
    files = {name: value for name, value in run.read("eval.json")["predictions"].items() if "test" not in name}
    released = dict(list(files.values())[-1])
    records = [json.loads(line) for line in (run.folder / "val.jsonl").read_text().splitlines()]
    mine = {record["id"]: record for record in records}
    assert mine.keys() == released.keys()
    for id, theirs in released.items():
        if isinstance(theirs, str):
            assert mine[id]["answer"] == theirs
        elif isinstance(theirs, dict):
            assert mine[id]["box"] == pytest.approx(theirs["pred_box"], abs=1e-3)
        else:  # scores, four by four (VCR)
            scores = torch.tensor(theirs).view(-1, 4).softmax(-1).flatten().tolist()
            assert mine[id]["probabilities"] == pytest.approx(scores, abs=1e-5)
