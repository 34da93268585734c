"""A study of tiny runs: what it compares, and that its page says no more than its numbers."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from villa.analysis.differences import Difference
from villa.cli.run import main
from villa.planning.dry_run import plan_recipe
from villa.studies.cells import UPDATES, Place, Row, best_validation
from villa.studies.page import sentence
from villa.studies.study import Study
from villa.studies.tables import Entry

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "projects" / "example" / "shapes"
RECIPE = f"""\
name: Shapes
output_dir: nowhere
recipe: {SHAPES}.yaml
options:
  user_dir: {SHAPES}
  training: {{epochs: null}}
  evaluation: {{every: 3}}
  logging: {{figures: false, tensorboard: false, progress: "off"}}
seeds: [1, 2]
updates: 6
match_compute: villa
lengths: [3]
axes: {{data: {{all: {{batch.examples: 32}}}}}}
methods:
  standard: {{trainer: standard}}
  twin: {{like: standard}}
  villa: {{trainer: villa}}
search_seeds: [1]
settings:
  standard: {{slow: {{optimizer.lr: 1.0e-3}}, fast: {{optimizer.lr: 1.0e-2}}}}
  villa: {{small: {{trainer.kl_weight: 0.5}}, large: {{trainer.kl_weight: 1.0}}}}
robustness: {{attacks: [fgm], radii: [0.1], checks: false, examples: 20, modalities: [text]}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("study") / "study.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def done(recipe: Path) -> Path:
    """The study's folder. Its runs take place in this process, so that the command finds all of them finished."""
    folder = recipe.parent / "out"
    study = Study(str(recipe), [f"output_dir={folder}"])
    for phase in (study.tries, study.training, study.attacks):  # each needs the one before
        sweep = phase()
        assert sweep is not None
        for run in sweep.runs:
            assert run.finished or main(run.arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert main(["--study", str(recipe), f"output_dir={folder}"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    return folder


def rows(folder: Path, **wanted: str) -> list[dict[str, str]]:
    with (folder / "study.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if wanted.items() <= row.items()]


def test_the_numbers_are_those_of_the_runs(done: Path) -> None:
    found = rows(done, measure="score", method="villa", budget="matched updates")
    reached = [
        100 * json.loads(path.read_text())["test"]["accuracy"]
        for path in done.glob(f"runs/data=all,method=villa,setting={found[0]['setting']},updates=6,*/metrics.json")
    ]
    assert [len(found), len(reached)] == [1, 2]
    assert float(found[0]["mean"]) == pytest.approx(sum(reached) / 2)
    base = rows(done, measure="score", method="standard", budget="matched updates")[0]
    assert float(found[0]["difference"]) == pytest.approx(float(found[0]["mean"]) - float(base["mean"]))
    (area,) = rows(done, measure="area text", method="villa", budget="matched updates")
    attacked = [json.loads(path.read_text()) for path in done.glob(f"attacks/*villa*{found[0]['setting']}*/*ness.json")]
    values = [100 * content["area_under_curve"]["text"]["worst"] for content in attacked]
    assert float(area["mean"]) == pytest.approx(sum(values) / 2)


def test_compute_is_matched_by_counted_operations(done: Path, recipe: Path) -> None:
    common = [f"config={SHAPES}.yaml", f"user_dir={SHAPES}"]
    ours, villas = (plan_recipe([*common, f"trainer={name}"])[0].flops for name in ("standard", "villa"))
    (found,) = rows(done, measure="score", method="standard", budget="matched compute")
    assert int(found["updates"]) == round(6 * villas / ours) > 12
    assert float(found["compute"]) == pytest.approx(int(found["updates"]) / 6)
    (other,) = rows(done, measure="score", method="villa", budget="matched compute")
    assert float(other["compute"]) == pytest.approx(villas / ours)


def test_validation_chooses_settings_and_updates(done: Path, recipe: Path) -> None:
    cells = Study(str(recipe), [f"output_dir={done}"]).cells
    (place,) = cells.places
    scores = {row.setting: best_validation(cells.configs(row, 1)[-1]) for row in cells.tries()[:2]}
    assert cells.chosen(place, "standard") == max(scores, key=lambda setting: scores[setting])
    lengths = {row: cells.validation(row, [1, 2]) for row in cells.lengths(place)}
    assert len(lengths) == 3
    assert cells.best(place) == max(lengths, key=lambda row: lengths[row])


def test_a_method_does_not_differ_from_itself(done: Path) -> None:
    found = rows(done, method="twin")
    assert len(found) >= 4
    assert {float(row[key]) for row in found for key in ("difference", "low", "high")} == {0.0}
    page = (done / "study.md").read_text()
    assert "`twin` and `standard` score the same on every example." in page
    assert "`twin` is " not in page


def test_the_page_says_what_its_table_carries(done: Path) -> None:
    """Every claim is of an interval that excludes 0."""
    page = (done / "study.md").read_text()
    for name in ("curves.png", "robustness.png"):
        assert (done / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in page
    for low, high in re.findall(r"is (?:better|worse) than .*\[([-+.\d]+), ([-+.\d]+)\]", page):
        assert float(low) * float(high) > 0
    for low, high in re.findall(r"^- No difference .*\[([-+.\d]+), ([-+.\d]+)\]", page, re.MULTILINE):
        assert float(low) * float(high) <= 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((1.0, 0.2, 1.8), "`villa` is better than `standard`: +1.00 points [+0.20, +1.80]."),
        ((-1.0, -1.8, -0.2), "`villa` is worse than `standard`: -1.00 points [-1.80, -0.20]."),
        (
            (1.0, -0.2, 2.2),
            "No difference between `villa` and `standard` is shown: +1.00 points [-0.20, +2.20]; 1.50 points would "
            "have been seen in four of five such studies.",
        ),
    ],
)
def test_a_sentence_follows_from_the_interval(values: tuple[float, float, float], said: str) -> None:
    row = Row(Place((), ()), "villa", None, 6)
    found = Difference(*values, detectable=1.5, seeds=3, examples=9)
    assert sentence(Entry("help", row.place, UPDATES, "score", row, 1.0, (1.0,), "standard", found)) == said


@pytest.mark.parametrize("name", ["study", "study_daquar"])
def test_the_studies_of_the_project_load(name: str, tmp_path: Path) -> None:
    study = Study(str(ROOT / "projects" / "villa" / f"{name}.yaml"), [f"output_dir={tmp_path}"])
    assert {len(settings) for settings in study.recipe.settings.values()} == {3}
    tries = study.cells.tries()
    assert len(tries) == 3 * len(study.recipe.methods) == 18
    assert {study.cells.configs(row, 1)[-1].trainer.name for row in tries} == set(study.recipe.methods)


@pytest.mark.parametrize(("name", "given"), [("stages", ["dataset.synthetic=true"]), ("modalities", [])])
def test_the_studies_of_the_page_load(name: str, given: list[str], tmp_path: Path) -> None:
    page = (ROOT / "docs" / "study.md").read_text().replace("recipe: projects", f"recipe: {ROOT}/projects")
    (tmp_path / "study.yaml").write_text(page.partition(f'```yaml title="{name}.yaml"\n')[2].partition("```")[0])
    cells = Study(str(tmp_path / "study.yaml"), [f"output_dir={tmp_path}", *given]).cells
    place, methods = cells.places[-1], cells.recipe.methods
    stages = [cells.configs(cells.row(place, method, UPDATES), 1) for method in methods]
    if name == "stages":
        trained = [[stage.trainer.name for stage in its[1:]] for its in stages]
        assert trained == [["standard"] * 2, ["villa", "standard"], ["standard", "villa"], ["villa"] * 2]
    else:
        assert len(cells.places) == 12
        assert {its[0].model.name for its in stages} == {"vilt"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("updates: 6", "updates: 0"), "updates = 0; give a whole number of at least 1"),
        (("seeds: [1, 2]\n", ""), "the study lacks 'seeds'"),
        (("seeds: [1, 2]", "seeds: [1, 1]"), "has a number twice"),
        (("search_seeds: [1]", "search_seeds: [7]"), "are not all among the seeds"),
        (("match_compute: villa", "match_compute: vila"), "names 'vila', which is none of the methods"),
        (("like: standard", "like: standart"), "is like 'standart', which is none of the methods before it"),
        (("lengths: [3]", "lenghts: [3]"), "a study has no 'lenghts'; did you mean 'lengths'?"),
        ((", large: {trainer.kl_weight: 1.0}", ""), "as many settings to try for each (standard 2, twin 2, villa 1)"),
        (("trainer: villa}", "trainer: vila}"), "no trainer is called 'vila'"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(
    change: tuple[str, str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[Any]
) -> None:
    path = tmp_path / "study.yaml"
    assert change[0] in RECIPE
    path.write_text(RECIPE.replace(*change))
    assert main(["--study", str(path), f"output_dir={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line
    assert not (tmp_path / "out").exists()


def test_a_missing_study_is_one_line(capsys: pytest.CaptureFixture[Any]) -> None:
    assert main(["--study", "nowhere.yaml"]) == 2
    assert "the study 'nowhere.yaml' does not exist" in capsys.readouterr().err
