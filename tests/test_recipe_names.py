"""Recipes that come with villa are found by name, wherever one is."""

from pathlib import Path

import pytest

from villa import recipes
from villa.cli.run import main
from villa.config import load_stages, to_yaml
from villa.plugins import load_user_dir


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resolved(*arguments: str) -> list[str]:
    return [to_yaml(stage.config) for stage in load_stages(arguments)]


@pytest.mark.parametrize("name", ["villa/easy_vqa", "villa/itm_flickr_hard_large", "villa/two_stage_vqa"])
def test_a_name_stands_for_the_file_with_all_that_it_includes(name: str, root: Path) -> None:
    found = resolved(f"config={name}")
    assert found == resolved(f"config={root / 'projects' / name}.yaml")
    assert found == resolved(f"config=projects/{name}.yaml") == resolved(f"config={name}.yaml")
    assert len(found) == (3 if "two_stage" in name else 1)


def test_a_local_file_wins(elsewhere: Path) -> None:
    shipped = resolved("config=villa/easy_vqa")
    (elsewhere / "villa").mkdir()
    (elsewhere / "villa" / "easy_vqa.yaml").write_text("includes: projects/villa/easy_vqa.yaml\nseed: 77\n")
    for name in ("villa/easy_vqa", "villa/easy_vqa.yaml"):
        assert load_stages([f"config={name}"])[0].config.seed == 77
    assert resolved("config=projects/villa/easy_vqa.yaml") == shipped


def test_recipes_of_one_s_own_include_them_and_list_them_as_stages(elsewhere: Path) -> None:
    (elsewhere / "mine.yaml").write_text("includes: [villa/vqa]\nname: mine\n")
    assert load_stages(["config=mine.yaml"])[0].config.model.name == "uniter"
    (elsewhere / "all.yaml").write_text("stages: [uniter/pretrain/indomain, mine.yaml]\n")
    assert [stage.config.dataset.name for stage in load_stages(["config=all.yaml"])] == ["pretraining", "vqa"]


def test_code_that_comes_with_a_recipe_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_stages(["config=example/shapes"])[0].config.user_dir == "projects/example/shapes"
    load_user_dir("example/shapes")
    assert main(["--list", "models", "user_dir=projects/example/shapes"]) == 0
    assert "average" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("villa/easy-vqa", "; did you mean 'villa/easy_vqa'? give the path of a YAML file, or a name of"),
        ("projects/villa/esy_vqa.yaml", "; did you mean 'villa/easy_vqa'? give"),
        ("../projects/villa/easy_vqa.yaml", "does not exist"),
        ("villa/../villa/easy_vqa", "does not exist"),
        ("villa", "does not exist"),
        ("", "give the path or name of a recipe"),
    ],
)
def test_other_names_are_one_line(name: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"config={name}", "--print-config"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_list_has_every_recipe_and_says_where_they_are(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "recipes"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert str(root / "projects") in heading
    listed = {line.split()[0]: line.split(maxsplit=1)[1:] for line in lines}
    assert {"villa/easy_vqa", "villa/paper/vqa_large"} <= listed.keys()
    assert not any("/_" in name for name in listed)
    assert all(recipes.shipped(name) for name in listed)
    assert listed["villa/easy_vqa"] == [
        "UNITER's architecture, small and from scratch, on easy-VQA: about two and a half minutes on two cores."
    ]
