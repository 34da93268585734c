"""The tool that turns a released configuration into a recipe, from its arguments to its exit code."""

import lzma
import tarfile
from pathlib import Path

import pytest
import yaml
from golden_utils import GOLDEN
from tool_runs import load_tool

from villa.config import RunConfig, from_yaml

TOOL = load_tool("import_config")


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a released run, with its configuration."""
    with lzma.open(GOLDEN / "e2e" / "nlvr2_text_l2.tar.xz") as file, tarfile.open(fileobj=file) as archive:
        for name in ("config.json", "hps.json", "model.json"):
            archive.extract(name, tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("file", ["config.json", "hps.json"])
def test_a_released_configuration_becomes_a_recipe_that_loads(
    released: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert TOOL.main([file, "--task", "nlvr2", "--root", "data"]) == 0
    Path("recipe.yaml").write_text(capsys.readouterr().out)
    config = from_yaml("recipe.yaml")
    assert isinstance(config, RunConfig)
    assert config.model.head == "nlvr2_paired_attn"
    assert config.trainer.text_step_size == 0.05
    assert config.dataset.root == "data"
    assert config.dataset.train_text == ["txt_db/nlvr2_train.db"]


def test_more_processes_make_larger_updates(released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = []
    for gpus in ("1", "4"):
        assert TOOL.main(["config.json", "--task", "nlvr2", "--gpus", gpus]) == 0
        sizes.append(yaml.safe_load(capsys.readouterr().out)["batch"]["tokens"])
    assert sizes[1] == 4 * sizes[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config.json"], "the following arguments are required: --task"),
        (["config.json", "--task", "gqa"], "argument --task: invalid choice: 'gqa'"),
        (["nowhere.json", "--task", "nlvr2"], "'nowhere.json'"),
        (["config.json", "--task", "nlvr2", "--gpus", "0"], "gpus=0 is too small"),
        (["model.json", "--task", "nlvr2"], "config/uniter-base.json"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    released: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert TOOL.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("import_config: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
