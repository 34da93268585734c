"""Recipes with stages are run: one after another, exactly resumed, and refused before anything is trained."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from tiny_runs import colours

from villa.cli.run import main
from villa.config.yaml_text import resolve
from villa.losses.classification import CrossEntropy


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two stages on made-up questions about colours, each of four updates."""
    nested: dict[str, Any] = {}
    for argument in colours(tmp_path):
        key, _, value = argument.partition("=")
        section, _, option = key.partition(".")
        if option:
            part = nested.setdefault(section, {})
            part[option] = resolve(value)
        else:
            nested[section] = {"name": value} if section in ("model", "dataset") else value
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(nested | {"name": "one", "run_type": "train"}))
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(nested | {"name": "two"}))
    path = tmp_path / "both.yaml"
    path.write_text(f"stages: [first.yaml, second.yaml]\noutput_dir: {tmp_path}/out\ncheckpoint: {{every: 1}}\n")
    return path


def weights(folder: Path, update: int = 4) -> dict[str, Any]:
    return load_file(folder / "checkpoints" / f"update_{update:08}" / "model.safetensors")


def run(recipe: Path, *args: str) -> int:
    return main([f"config={recipe}", *args])


def test_the_second_stage_starts_from_the_weights_of_the_first(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe, "stage2.optimizer.lr=1e-30") == 0
    out = recipe.parent / "out"
    first, second = weights(out / "stage1_one"), weights(out / "stage2_two")
    assert first.keys() == second.keys()
    assert all(value.equal(first[name]) for name, value in second.items())
    assert not (out / "stage1_one" / "metrics.json").exists()
    assert (out / "stage2_two" / "metrics.json").exists()
    printed = capsys.readouterr().out
    assert f"stage 1 of 2 (one): {out}/stage1_one\n" in printed
    assert f"stage 2 of 2 (two): {out}/stage2_two\n" in printed


class Killed(BaseException):
    """Ends a run at once, as a kill does."""


@pytest.mark.parametrize("calls", [3, 8, 11, 13])
def test_a_killed_run_goes_on_in_its_stage(
    recipe: Path, calls: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in the first stage; in the second before and after a checkpoint, and in its test."""
    whole, out = recipe.parent / "whole", recipe.parent / "out"
    assert run(recipe, f"output_dir={whole}") == 0
    forward, left = CrossEntropy.forward, [calls]

    def dies(self: CrossEntropy, *args: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise Killed
        return forward(self, *args)

    monkeypatch.setattr(CrossEntropy, "forward", dies)
    with pytest.raises(Killed):
        run(recipe)
    capsys.readouterr()
    assert run(recipe, "checkpoint.resume=true") == 0
    printed = capsys.readouterr().out
    assert (f"stage 1 of 2 (one): finished, {out}/stage1_one\n" in printed) is (calls > 6)
    for stage in ("stage1_one", "stage2_two"):
        assert (out / stage / "log.jsonl").read_bytes() == (whole / stage / "log.jsonl").read_bytes()
        assert all(value.equal(weights(whole / stage)[name]) for name, value in weights(out / stage).items())


def test_finished_stages_are_passed_over_unless_their_recipe_has_changed(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe) == 0
    capsys.readouterr()
    assert run(recipe, "checkpoint.resume=true") == 0
    printed = capsys.readouterr().out
    assert printed.count("finished, ") == 2
    assert "updates" not in printed
    assert run(recipe, "checkpoint.resume=true", "stage2.training.updates=5") == 0
    printed = capsys.readouterr().out
    assert printed.count("finished, ") == 1
    assert "changed since: training.updates: 4 -> 5" in printed
    assert weights(recipe.parent / "out" / "stage2_two", 5)


def test_folders_and_data_of_all_stages_are_looked_at_first(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = recipe.parent / "out"
    assert run(recipe, "stage2.dataset.train=gone.jsonl") == 2
    assert "villa_run: error: stage 2: " in capsys.readouterr().err
    assert not out.exists()
    (out / "stage2_two").mkdir(parents=True)
    (out / "stage2_two" / "log.jsonl").write_text("")
    assert run(recipe) == 2
    assert "stage 2: output_dir" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    assert not (out / "stage1_one").exists()


def test_the_configuration_of_every_stage_is_printed(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(recipe, "--print-config") == 0
    printed = capsys.readouterr().out
    assert [line.split("#")[0].strip() for line in printed.splitlines() if line.startswith("name:")] == [
        "name: one",
        "name: two",
    ]
    assert run(recipe, "--perturbation-points") == 0
    assert capsys.readouterr().out.count("can be perturbed in") == 2


def test_a_signal_ends_the_stages_in_order(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    forward = CrossEntropy.forward

    def signals(self: CrossEntropy, *args: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return forward(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(CrossEntropy, "forward", signals)
        assert run(recipe, "evaluation.split=null") == 128 + signal.SIGTERM
    assert not (recipe.parent / "out" / "stage2_two").exists()
    assert run(recipe, "evaluation.split=null", "checkpoint.resume=true") == 0
