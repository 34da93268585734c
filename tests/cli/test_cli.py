"""``villa_run`` from its arguments to its exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import shapes  # noqa: F401 - registers the example project's model and data set

from villa.cli.run import main
from villa.config import RunConfig, from_yaml, to_yaml

RECIPE = """\
model: average
dataset: {name: shapes, examples: 16}
trainer: {name: villa, reference: official, steps: 2, modality: both}
batch: {examples: 8}
training: {updates: 2}
output_dir: out
logging: {tensorboard: false}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The argument that names a valid recipe in the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    return "config=recipe.yaml"


def test_print_config_shows_a_recipe_that_loads(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([recipe, "--print-config", "seed=3"]) == 0
    text = capsys.readouterr().out
    assert "seed: 3   # command line\n" in text
    assert "  steps: 2   # recipe.yaml:3\n" in text
    Path("shown.yaml").write_text(text)
    shown = from_yaml("shown.yaml")
    assert isinstance(shown, RunConfig)
    assert shown.seed == 3
    assert main([recipe, "--print-config", "--no-origins", "seed=3"]) == 0
    plain = capsys.readouterr().out
    assert plain == to_yaml(shown)
    assert "#" not in plain


def test_a_recipe_runs(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([recipe, "trainer=freelb"]) == 0
    assert "villa_run: dropped trainer.reference (recipe.yaml:3)" in capsys.readouterr().err
    assert json.loads(next(Path("out").rglob("metrics.json")).read_text())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["config=nowhere.yaml"], "the recipe 'nowhere.yaml' does not exist; give the path of a YAML file"),
        (["--fast"], "unrecognized arguments: --fast; villa_run --help shows the usage"),
        (["--print"], "unrecognized arguments: --print; villa_run --help shows the usage"),
        (["--list", "modls"], "--list 'modls': nothing of that kind; did you mean 'models'?"),
        (["recipe.yaml"], "the argument 'recipe.yaml' is not of the form key=value; did you mean"),
        ([], "model: missing; name one with model=NAME or in the recipe"),
        (["confg=own.yaml"], "confg (command line): unknown key; did you mean 'config'?"),
        (["modle=uniter"], "modle (command line): unknown key; did you mean 'model'?"),
        (["--help", "trainer=vila"], "no trainer is called 'vila'; did you mean 'villa'?"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("villa_run: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_list_names_everything_with_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    headings = [line for line in lines if not line.startswith(" ")]
    assert headings == [
        "models:",
        "datasets:",
        "losses:",
        "trainers:",
        "metrics:",
        "optimizers:",
        "schedulers:",
        "launchers:",
        "submissions:",
        "attacks:",
        "shifts:",
        "callbacks:",
        "trackers:",
        "extractors:",
    ]
    entries = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(" ")}
    assert {"uniter", "villa", "adamw", "linear", "accuracy"} <= set(entries)
    assert all(len(summary) > 1 for name, summary in entries.items() if name in ("villa", "adamw"))


def test_list_of_one_kind_with_a_user_dir(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = "from villa.registry import register_loss\nfrom villa.losses.base import Loss\n"
    Path("cli_plugin.py").write_text(f"{code}@register_loss('cli_test')\nclass Mine(Loss):\n    'My own loss.'\n")
    assert main(["--list", "losses", "user_dir=cli_plugin.py"]) == 0
    assert "cli_test" in capsys.readouterr().out


PLUGIN = """
from dataclasses import dataclass
from villa.losses.base import Loss, LossConfig
from villa.registry import register_loss

@dataclass
class MineConfig(LossConfig):
    size: int = 3

@register_loss(__name__)
class Mine(Loss):
    Config = MineConfig
"""


@pytest.mark.parametrize("named", ["user_dir={}.py", "config={}.yaml"])
def test_help_knows_the_classes_of_a_user_dir(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"help_plugin_{named[:6]}"  # no other module of this process is called so
    Path(f"{name}.py").write_text(PLUGIN)
    Path(f"{name}.yaml").write_text(f"user_dir: {name}.py\n")
    assert main(["--help", named.format(name), f"loss={name}"]) == 0
    assert "  loss.size: an integer; default 3\n" in capsys.readouterr().out
    assert main(["--list", "losses", named.format(name)]) == 0
    assert name in capsys.readouterr().out


def test_help_documents_sections_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    assert "villa_run config=recipe.yaml trainer=freelb" in page
    assert "  training.precision: one of 'fp32', 'bf16', 'fp16'; default fp32\n" in page
    assert "  names: constant, cosine, linear, noam, warmup_linear\n" in page
    assert "early" in page  # documentation of evaluation.patience
    assert max(map(len, page.splitlines())) <= 120


@pytest.mark.parametrize("dataset", ["jsonl", "vcr", "lxmert_gqa"])
def test_help_documents_options_of_base_classes_too(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help", f"dataset={dataset}"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    names = [number for number, line in enumerate(lines) if line.startswith("  dataset.")]
    assert len(names) > 10
    assert all(lines[number + 1].startswith("      ") for number in names)  # a line of documentation below each


@pytest.mark.parametrize("section", ["trainer=villa", "trainer=freelb", "model=lxmert"])
def test_help_has_no_markup(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help", section]) == 0
    assert "``" not in capsys.readouterr().out


def test_help_of_a_variant_documents_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-h", "trainer=villa"]) == 0
    page = capsys.readouterr().out
    assert "  presets: trainer.reference = paper, official\n" in page
    assert "  trainer.kl_weight: a number; default 1.0\n      alpha, the weight of the KL term.\n" in page


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("villa_run ")


def test_an_interrupt_is_exit_code_130(recipe: str) -> None:
    Path("stop_plugin.py").write_text("raise KeyboardInterrupt")
    assert main([recipe, "user_dir=stop_plugin.py"]) == 130


def test_a_reader_that_stops_early_is_no_error(root: Path) -> None:
    command = [sys.executable, "-m", "villa.cli.run", "--help"]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
