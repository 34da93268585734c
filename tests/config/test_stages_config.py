"""Recipes with stages: what wins, where their folders are, what each starts from, and clear errors."""

from pathlib import Path

import pytest

from villa.config import load, load_stages
from villa.config.loader import Loaded
from villa.errors import ConfigError

BASE = """
model: {name: text_classifier}
dataset: {name: jsonl, train: a.jsonl}
batch: {examples: 8}
training: {updates: 4}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/first.yaml").write_text("includes: ../base.yaml\nname: one\nrun_type: train\nseed: 1\n")
    second = "includes: ../base.yaml\nname: two\nmodel: {checkpoint: elsewhere}\ntrainer: {name: freelb, steps: 5}\n"
    (tmp_path / "recipes/second.yaml").write_text(second)
    return tmp_path


def stages(folder: Path, text: str, *args: str) -> list[Loaded]:
    path = folder / "whole.yaml"
    path.write_text(text)
    return load_stages([f"config={path}", *args])


TWO = "stages: [recipes/first.yaml, recipes/second.yaml]\n"


def test_every_stage_has_a_folder_and_starts_from_the_one_before(folder: Path) -> None:
    one, two = (loaded.config for loaded in stages(folder, TWO + "output_dir: out/${seed}\n"))
    assert (one.output_dir, two.output_dir) == ("out/1/stage1_one", "out/1/stage2_two")
    assert (one.model.checkpoint, two.model.checkpoint) == (None, "out/1/stage1_one")
    assert (one.run_type, two.run_type) == ("train", "train_val_test")
    assert (one.seed, two.seed, two.trainer.steps) == (1, 0, 5)


def test_the_folder_of_the_whole_is_what_its_name_gives_the_first_stage(folder: Path) -> None:
    (folder / "recipes/first.yaml").write_text("includes: ../base.yaml\nname: one\noutput_dir: out/${name}_${seed}\n")
    one, two = (loaded.config for loaded in stages(folder, TWO))
    assert (one.output_dir, two.output_dir) == ("out/whole_0/stage1_one", "out/whole_0/stage2_two")
    one, two = (loaded.config for loaded in stages(folder, TWO + "name: both\n", "seed=3"))
    assert (one.output_dir, two.output_dir) == ("out/both_3/stage1_one", "out/both_3/stage2_two")
    one, _ = (loaded.config for loaded in stages(folder, TWO + "name: both\n", "output_dir=here/${name}"))
    assert (one.output_dir, one.name) == ("here/both/stage1_one", "one")


def test_what_is_given_for_a_stage_wins_over_what_is_given_for_all_in_the_same_place(folder: Path) -> None:
    recipe = TWO + "optimizer: {lr: 1.0}\nstage2:\n  optimizer: {lr: 2.0}\n  trainer: {steps: 7}\n"
    one, two = (loaded.config for loaded in stages(folder, recipe))
    assert (one.optimizer.lr, two.optimizer.lr, two.trainer.steps) == (1.0, 2.0, 7)
    one, two = (loaded.config for loaded in stages(folder, recipe, "optimizer.lr=3"))
    assert (one.optimizer.lr, two.optimizer.lr) == (3.0, 3.0)
    arguments = ("stage1.optimizer.lr=4", "optimizer.lr=3", "stage2.trainer=standard", "stage1.trainer={name: freelb}")
    one, two = (loaded.config for loaded in stages(folder, recipe, *arguments))
    assert (one.optimizer.lr, two.optimizer.lr) == (4.0, 3.0)
    assert (one.trainer.name, two.trainer.name) == ("freelb", "standard")


def test_origins_are_those_of_the_lines(folder: Path) -> None:
    one, two = stages(folder, TWO + "stage2:\n  optimizer: {lr: 2.0}\n", "stage1.seed=5")
    assert str(one.origins["seed"]) == "command line"
    assert str(two.origins["optimizer.lr"]) == f"{folder}/whole.yaml:3"
    assert str(two.origins["trainer.steps"]) == f"{folder}/recipes/second.yaml:4"
    assert {str(two.origins[key]) for key in ("output_dir", "model.checkpoint")} == {"stages"}


def test_where_a_stage_starts_may_be_said(folder: Path) -> None:
    one, two, three = (
        loaded.config
        for loaded in stages(
            folder,
            "stages: [recipes/first.yaml, recipes/second.yaml, recipes/second.yaml]\noutput_dir: o\n"
            "stage3: {output_dir: mine}\n",
            "model.checkpoint=start",
            "stage2.model.checkpoint=null",
        )
    )
    assert (one.model.checkpoint, two.model.checkpoint, three.model.checkpoint) == ("start", None, "o/stage2_two")
    assert three.output_dir == "mine"


def test_a_stage_may_stand_in_the_list(folder: Path) -> None:
    text = (
        "stages:\n  - recipes/first.yaml\n"
        "  - {includes: [recipes/second.yaml], name: inline, seed: 007, optimizer: {lr: 1e-3}}\noutput_dir: o\n"
    )
    _, two = stages(folder, text)
    assert (two.config.name, two.config.seed, two.config.optimizer.lr) == ("inline", 7, 1e-3)
    assert two.config.trainer.steps == 5
    assert str(two.origins["optimizer.lr"]) == f"{folder}/whole.yaml:2"


def test_stages_on_the_command_line_are_relative_to_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    one, two = (loaded.config for loaded in load_stages(["stages=[recipes/first.yaml, recipes/second.yaml]"]))
    assert (one.name, two.model.checkpoint) == ("one", one.output_dir)


def test_braces_in_a_folder_are_no_interpolation(folder: Path) -> None:
    _, two = (loaded.config for loaded in stages(folder, TWO, r"output_dir='o\${x'"))
    assert (two.output_dir, two.model.checkpoint) == ("o${x/stage2_two", "o${x/stage1_one")


def test_a_recipe_without_stages_is_one_configuration(folder: Path) -> None:
    (only,) = load_stages([f"config={folder}/recipes/first.yaml", "seed=4"])
    assert only == load([f"config={folder}/recipes/first.yaml", "seed=4"])


@pytest.mark.parametrize(
    ("text", "args", "message"),
    [
        ("stages: []\n", (), "whole.yaml:1): give a list of recipes"),
        ("stages: first.yaml\n", (), "give a list of recipes"),
        ("stages: [3]\n", (), "give a list of recipes"),
        ("stages: [gone.yaml]\n", (), "whole.yaml:1): the recipe '"),
        ("stages: [whole.yaml]\n", (), "a stage has stages itself"),
        (TWO, ("stage2.optimizer.lrr=1",), "stage 2: optimizer.lrr (command line): unknown key; did you mean"),
        (TWO, ("stage2.seed=x",), "stage 2: seed = 'x' (command line): must be an integer"),
        (TWO, ("stage3.seed=1",), "stage3.seed (command line): the recipe has the stages 1 to 2"),
        (TWO, ("stage0.seed=1",), "stage0.seed (command line): the recipe has the stages 1 to 2"),
        (TWO, ("run_type=test",), "run_type = 'test' (command line): stages only train"),
        (TWO, ("checkpoint.path=x",), "checkpoint.path (command line): a stage starts from model.checkpoint"),
        (TWO + "stage1: {modle: x}\n", (), "stage 1: modle ("),
        ("stages: [{name: x, includes: gone.yaml}]\n", (), "includes ("),
    ],
)
def test_mistakes_are_one_line_with_their_place(folder: Path, text: str, args: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        stages(folder, text, *args)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_run_cannot_be_made_of_stages(folder: Path) -> None:
    (folder / "whole.yaml").write_text(TWO)
    with pytest.raises(ConfigError, match=r"stages \(.*whole\.yaml:1\): this recipe has several stages"):
        load([f"config={folder}/whole.yaml"])
