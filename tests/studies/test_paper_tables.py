"""The paper's tables at a small size: stages, modalities, backbones, and FreeLB against VILLA."""

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import colours

from villa.cli.run import main
from villa.config.yaml_text import resolve
from villa.planning.dry_run import plan_recipe
from villa.studies.study import Study

STAGES = """\
name: Stages
output_dir: nowhere
recipe: both.yaml
seeds: [1]
updates: 3
updates_option: stage2.training.updates
match_compute: both
options: {trainer: {name: standard}, stage1: {training: {updates: 2}}}
methods:
  neither: {}
  pre: {stage1.trainer: {name: villa, steps: 2}}
  fine: {stage2.trainer: {name: villa, steps: 2}}
  both: {like: pre, stage2.trainer: {name: villa, steps: 2}}
robustness: {attacks: [fgm], radii: [0.1], checks: false, examples: 8, modalities: [text]}
"""
BACKBONES = """\
name: Backbones
output_dir: nowhere
recipe: one.yaml
seeds: [1]
updates: 2
axes:
  backbone:
    uniter: {model: {name: uniter, hidden_size: 16, num_layers: 1, num_heads: 2}}
    lxmert:
      model: {name: lxmert, hidden_size: 16, intermediate_size: 16, num_heads: 2}
      model.language_layers: 1
      model.vision_layers: 1
      model.cross_layers: 1
    vilt:
      model: {name: vilt, head: answers, hidden_size: 16, num_layers: 1, num_heads: 2, image_size: 16, patch_size: 8}
      dataset: {synthetic: true, synthetic_examples: 64, regions: pixels, image_size: 16}
methods:
  standard: {trainer: standard}
  freelb: {trainer: {name: freelb, modality: both, steps: 2}}
  text: {trainer: {name: villa, modality: text, steps: 2}}
  image: {trainer: {name: villa, modality: image, steps: 2}}
  villa: {trainer: {name: villa, modality: both, steps: 2}}
questions:
  modality: {title: "Which modality?", against: standard, methods: [text, image, villa]}
  freelb: {title: "FreeLB or VILLA?", against: freelb, methods: [villa]}
"""


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes of one run, of a run of two stages, and of the studies of both."""
    folder: Path = tmp_path_factory.mktemp("tables")
    nested: dict[str, Any] = {"evaluation": {"every": 1}, "training": {}}
    for argument in colours(folder, examples=8):
        key, _, value = argument.partition("=")
        section, _, option = key.partition(".")
        if option and section != "training":
            nested.setdefault(section, {})[option] = resolve(value)
        elif not option:
            nested[section] = {"name": value} if section in ("model", "dataset") else value
    nested["logging"] = {"figures": False, "tensorboard": False, "progress": "off"}
    (folder / "one.yaml").write_text(yaml.safe_dump(nested | {"name": "one"}))
    (folder / "first.yaml").write_text(yaml.safe_dump(nested | {"name": "first", "run_type": "train"}))
    (folder / "both.yaml").write_text("stages: [first.yaml, one.yaml]\nname: two\n")
    for name, recipe in (("stages", STAGES), ("backbones", BACKBONES)):
        (folder / f"{name}.yaml").write_text(recipe)
    return folder


def run(path: Path) -> tuple[Study, Path]:
    """Run a study in this process, then report; return it and its folder."""
    folder = path.with_suffix("")
    study = Study(str(path), [f"output_dir={folder}"])
    for phase in (study.tries, study.training, study.attacks):
        sweep = phase()
        for each in sweep.runs if sweep else []:
            assert main(each.arguments) == 0
    study.report()
    return study, folder


def rows(folder: Path, **wanted: str) -> list[dict[str, str]]:
    with (folder / "study.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if wanted.items() <= row.items()]


def test_stages_are_methods_whose_every_stage_costs(recipes: Path) -> None:
    study, folder = run(recipes / "stages.yaml")
    (place,) = study.cells.places
    common = [f"config={recipes / 'one.yaml'}", "training.updates=3"]
    one, ascents = (
        plan_recipe([*common, f"trainer={name}"])[0].flops for name in ("standard", "{name: villa, steps: 2}")
    )
    assert one is not None
    assert ascents is not None
    costs = {name: 2 * first + 3 * second for name, first, second in (
        ("neither", one, one), ("pre", ascents, one), ("fine", one, ascents), ("both", ascents, ascents)
    )}  # fmt: skip
    for name, cost in costs.items():
        (row,) = rows(folder, method=name, budget="matched updates", measure="score")
        assert float(row["compute"]) == pytest.approx(cost / costs["neither"])
    left = {"neither": (costs["both"] - 2 * one) / one, "pre": (costs["both"] - 2 * ascents) / one}
    for name, updates in left.items():
        assert study.cells.length(place, name) == round(updates) > 3
        (row,) = rows(folder, method=name, budget="matched compute", measure="area text")
        assert int(row["updates"]) == round(updates)
    trainers = {
        name: [stage.trainer.name for stage in study.cells.configs(study.cells.row(place, name, "matched updates"), 1)]
        for name in costs
    }
    assert trainers == {
        "neither": ["standard", "standard"],
        "pre": ["villa", "standard"],
        "fine": ["standard", "villa"],
        "both": ["villa", "villa"],
    }


def test_backbones_and_modalities_have_a_table_each_and_one_for_all(recipes: Path) -> None:
    study, folder = run(recipes / "backbones.yaml")
    names = {
        place.label: study.cells.configs(study.cells.row(place, "text", "matched updates"), 1)[-1]
        for place in study.cells.places
    }
    assert {label: config.model.name for label, config in names.items()} == {
        "backbone uniter": "uniter",
        "backbone lxmert": "lxmert",
        "backbone vilt": "vilt",
    }
    page = (folder / "study.md").read_text()
    for title, methods in (
        ("Which modality?", ["standard", "text", "image", "villa"]),
        ("FreeLB or VILLA?", ["freelb", "villa"]),
    ):
        table = [
            row.split("|")[1:-1]
            for row in page.partition(f"## {title}\n")[2].partition("##")[0].splitlines()
            if row.startswith("|")
        ]
        cells = [[cell.strip() for cell in row] for row in table]
        assert cells[0] == ["method", *names, "mean"]
        assert [row[0] for row in cells[2:]] == methods
        for method, *values, mean in cells[2:]:
            found = [rows(folder, place=place, method=method, measure="score")[0]["mean"] for place in names]
            assert values == [f"{float(value):.2f}" for value in found]
            assert float(mean) == pytest.approx(sum(map(float, found)) / 3, abs=0.006)
    for number in (1, 2, 3):
        assert (folder / f"curves_{number}.png").is_file()
