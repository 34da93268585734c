from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from shapes.model import AverageConfig, AverageModel

from villa.config import RunConfig, from_yaml, load, to_yaml
from villa.errors import ConfigError
from villa.registry import register_model
from villa.trainers.freelb import FreeLBConfig
from villa.trainers.villa import VillaConfig


@dataclass
class TextConfig(AverageConfig):
    root: str | None = None


@register_model("average_with_text")
class AverageWithText(AverageModel):
    """A model that has an option of text."""

    Config = TextConfig


def error(*args: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(args)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_recipe_becomes_typed_sections(recipe: str) -> None:
    config = load([recipe, "seed=7"]).config
    assert isinstance(config, RunConfig)
    assert isinstance(config.trainer, VillaConfig)
    assert (config.trainer.steps, config.trainer.kl_weight) == (4, 0.1)
    assert config.output_dir == "out/villa/s7"
    assert (config.loss.name, config.optimizer.name, config.scheduler.name) == ("cross_entropy", "adamw", "linear")
    assert config.batch.examples == 8


def test_the_order_of_precedence(write: Callable[..., str]) -> None:
    write("seed: 1\nname: a\ndevice: cpu\nmodel: average\ndataset: shapes\nbatch: {examples: 2}", "base.yaml")
    write("includes: base.yaml\nname: b\ndevice: auto\ntraining: {epochs: 1}")
    loaded = load(["config=recipe.yaml", "device=cuda", "device=cuda:1"])
    assert (loaded.config.seed, loaded.config.name, loaded.config.device) == (1, "b", "cuda:1")
    origins = {key: str(loaded.origins[key]) for key in ("seed", "name", "device", "logging.every", "trainer.name")}
    assert origins == {
        "seed": "base.yaml:1",
        "name": "recipe.yaml:2",
        "device": "command line",
        "logging.every": "default",
        "trainer.name": "default",
    }


def test_of_two_alternatives_the_one_given_later_replaces_the_other(write: Callable[..., str]) -> None:
    base = "model: average\ndataset: shapes\nbatch: {examples: 2}\ntraining: {epochs: 1}"
    write(base, "base.yaml")
    write("includes: base.yaml\ntraining: {updates: 5}")
    recipe = "config=recipe.yaml"
    assert (load([recipe]).config.training.updates, load([recipe]).config.training.epochs) == (5, None)
    loaded = load([recipe, "training.epochs=3", "batch.tokens=90"])
    assert (loaded.config.training.updates, loaded.config.training.epochs) == (None, 3)
    assert (loaded.config.batch.examples, loaded.config.batch.tokens) == (None, 90)
    assert str(loaded.origins["training.updates"]) == "command line"
    Path("saved.yaml").write_text(to_yaml(loaded.config))
    assert load(["config=saved.yaml", "training.updates=4"]).config.training.epochs is None
    assert load([recipe, "training.updates=null", "training.epochs=2"]).config.training.epochs == 2
    write(f"{base[:-1]}, updates: 5}}", "both.yaml")
    assert "both.yaml:4): training.updates is 5 too" in error("config=both.yaml")


def test_a_preset_lies_between_the_defaults_and_the_recipe(recipe: str) -> None:
    loaded = load([recipe, "trainer.clean_loss=true"])
    assert (loaded.config.trainer.modality, loaded.config.trainer.init) == ("text", "zero")
    assert loaded.config.trainer.clean_loss is True
    assert str(loaded.origins["trainer.modality"]) == "preset 'official'"
    assert str(loaded.origins["trainer.clean_loss"]) == "command line"
    paper = load([recipe, "trainer.reference=paper"])
    assert paper.config.trainer.modality == "alternating"
    assert str(paper.origins["trainer.init"]) == "preset 'paper'"


def test_choosing_another_variant_drops_what_it_does_not_know(recipe: str) -> None:
    loaded = load([recipe, "trainer=freelb"])
    assert isinstance(loaded.config.trainer, FreeLBConfig)
    assert loaded.config.trainer.steps == 4
    assert loaded.notices == [
        "dropped trainer.reference (recipe.yaml:5): not an option of trainer 'freelb'",
        "dropped trainer.kl_weight (recipe.yaml:7): not an option of trainer 'freelb'",
    ]


def test_a_recipe_may_choose_another_variant_than_what_it_includes(recipe: str, write: Callable[..., str]) -> None:
    write("includes: recipe.yaml\ntrainer: freelb", "other.yaml")
    assert len(load(["config=other.yaml"]).notices) == 2
    write("includes: recipe.yaml\ntrainer: {name: freelb, kl_weight: 2}", "other.yaml")
    assert "trainer.kl_weight (other.yaml:2): unknown key" in error("config=other.yaml")


def test_naming_the_same_variant_again_drops_nothing(recipe: str) -> None:
    assert load([recipe, "trainer=villa"]).config.trainer.kl_weight == 0.1
    assert load([recipe, "trainer=villa"]).notices == []


def test_options_of_the_new_variant_on_the_command_line_are_checked(recipe: str) -> None:
    assert "trainer.kl_weight (command line): unknown key" in error(recipe, "trainer=freelb", "trainer.kl_weight=2")


def test_whole_sections_and_mappings_can_be_given(recipe: str) -> None:
    config = load([recipe, "training={updates: null, epochs: 2}", "optimizer.lr_multipliers={a.b: 2}"]).config
    assert (config.training.updates, config.training.epochs) == (None, 2)
    assert config.optimizer.lr_multipliers == {"a.b": 2.0}
    single = load([recipe, "optimizer.lr_multipliers.a.b=.5", "optimizer.lr_multipliers.c=1"])
    assert single.config.optimizer.lr_multipliers == {"a.b": 0.5, "c": 1.0}


def test_text_stays_as_it_was_written(recipe: str) -> None:
    for text in ("007", "1e3", "true", "0x10"):
        assert load([recipe, f"name={text}"]).config.name == text
    assert load([recipe, "name='null'"]).config.name == "null"


@pytest.mark.parametrize(
    "text",
    [
        *("{question} Answer.", "{question}", "a: b", "a: b: c", "[x", "[x]", "{}", "*x", "@x", "%x", "&x", "!x", "`x"),
        *(
            "# x",
            "a # b",
            "|",
            ">",
            "- a",
            "? a",
            "'tis",
            '"a" b',
            "x=y",
            "010",
            "2024-01-01",
            "12:30",
            "yes",
            "\uffff",
        ),
    ],
)
@pytest.mark.parametrize("key", ["name", "evaluation.split", "model.root"])
def test_an_option_of_text_takes_what_the_command_line_says_as_it_is(recipe: str, key: str, text: str) -> None:
    config = load([recipe, "model=average_with_text", f"{key}=before", f"{key}= {text} "]).config
    found = {"name": config.name, "evaluation.split": config.evaluation.split, "model.root": config.model.root}
    assert found[key] == text
    Path("again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load(["config=again.yaml"]).config == config


def test_of_equal_texts_the_last_one_wins_however_they_are_written(recipe: str) -> None:
    for last in ("x", "{a: 1}", "[x"):
        assert load([recipe, "name=a", "name={a: 1}", "name=[b", f"name={last}"]).config.name == last


def test_an_empty_mapping_empties_an_option_and_leaves_a_section(recipe: str) -> None:
    config = load([recipe, "optimizer.lr_multipliers.a=2", "optimizer.lr_multipliers={}", "training={}"]).config
    assert (config.optimizer.lr_multipliers, config.training.updates) == ({}, 3)


def test_exact_conversions_are_made(recipe: str) -> None:
    config = load([recipe, "optimizer.lr=1", "seed='3'", "optimizer.betas=[0, 0.5]", "scheduler.warmup=0.5"]).config
    assert (config.optimizer.lr, config.seed, config.optimizer.betas) == (1.0, 3, (0.0, 0.5))
    assert config.scheduler.warmup == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.stps=3", "trainer.stps (command line): unknown key; did you mean 'trainer.steps'? (known: name, "),
        ("trainr.steps=3", "trainr.steps (command line): unknown key; did you mean 'trainer.steps'?"),
        ("steps=3", "steps (command line): unknown key; did you mean 'trainer.steps'? (known: run_type, name, "),
        ("batch=3", "batch (command line): it is a section, not a value; give its keys: examples, tokens"),
        ("seed.x=3", "seed.x (command line): 'seed' is an integer, without keys of its own"),
        ("trainer.steps=2.5", "trainer.steps = 2.5 (command line): must be an integer"),
        ("trainer.steps=true", "trainer.steps = true (command line): must be an integer"),
        ("trainer.steps=", "trainer.steps = null (command line): must be an integer"),
        ("trainer.steps=[1]", "trainer.steps = [1] (command line): must be an integer"),
        ("optimizer.lr=true", "optimizer.lr = true (command line): must be a number"),
        ("optimizer.lr=fast", "optimizer.lr = 'fast' (command line): must be a number"),
        (f"optimizer.lr={10**400}", "(command line): must be a number"),
        ("optimizer.betas=[1]", "must be a list of 2: a number, a number"),
        ("optimizer.lr_multipliers=3", "must be a mapping to (a number)"),
        ("optimizer.lr_multipliers.a=x", "optimizer.lr_multipliers.a = 'x' (command line): must be a number"),
        ("evaluation.metrics=accuracy", "must be a list of (a string)"),
        ("evaluation.metrics=[1e3]", "evaluation.metrics = [1000.0] (command line): must be a list of (a string)"),
        ("logging.tensorboard=perhaps", "must be true or false"),
        ("training.precision=fp17", "must be one of 'fp32', 'bf16', 'fp16'; did you mean 'fp16'?"),
        ("trainer=vila", "trainer (command line): no trainer is called 'vila'; did you mean 'villa'? (known: "),
        ("trainer.name=3", "no trainer is called '3'"),
        ("trainer=", "trainer = null (command line): give a registered name, or a mapping with one (known: "),
        ("trainer.reference=offical", "(command line): trainer 'villa' has no such preset; did you mean 'official'?"),
        ("trainer.steps=0", "trainer.steps is 0; it must be at least 1 and at most 100,000 (command line)"),
        ("trainer.steps=100001", "trainer.steps is 100001; it must be at least 1 and at most 100,000 (command line)"),
        ("name=${zz}", "name = '${zz}' (command line): Interpolation key 'zz' not found"),
        ("name=${name}", "name = '${name}' (command line): Recursive interpolation"),
        ("name=${", "name = '${' (command line): no viable alternative at input '${'; write \\${ for a literal ${"),
        ("seed=${name}", "seed = '${name}' (command line): "),
        ("evaluation.metrics=['${zz}']", "Interpolation key 'zz' not found"),
        ("optimizer.betas=\\${0}", "must be a list of 2: a number, a number"),
        ("name=${oc.env:VILLA_NO_SUCH_VARIABLE}", "VILLA_NO_SUCH_VARIABLE"),
        ("name=" + "${" * 3000, "no viable alternative at input"),
        ("optimizer.lr_multipliers.a=-", "optimizer.lr_multipliers.a = [None] (command line): must be a number"),
        ("seed={a: b}", "seed.a (command line): 'seed' is an integer, without keys of its own"),
        ("seed=[", "seed = '[' (command line: not valid YAML: "),
        ("seed='a", "not valid YAML"),
        ("trainer=@x", "trainer = '@x' (command line: not valid YAML: "),
        ("batch=[", "batch (command line): it is a section, not a value"),
        ("name=null", "name = null (command line): must be a string; write it in quotes of YAML for the text 'null'"),
        ("name=\0", "not valid YAML: character 0x0 is not allowed"),
        ("name=\ud800", "not valid YAML: character 0xd800 is not allowed"),
        (f"seed={'[' * 100_000}", "nested too deeply"),
        ("a..b=1", "'a..b' (command line) is not a key; write section.option=value"),
        ("=1", "'' (command line) is not a key"),
        ("other.yaml", "did you mean 'config=other.yaml'?"),
        ("config=", "config='' (command line): give the path or name of a recipe"),
        ("includes=x", "includes (command line): unknown key"),
        ("trainer.name={a: 1}", "trainer (command line): no trainer is called '{a: 1}'"),
        ("user_dir=nowhere", "user_dir 'nowhere' does not exist; give a package folder or a .py file (command line)"),
        ("user_dir=${name}", "give a plain path"),
        ("user_dir=~nobody-here/x", "not a usable path: '~nobody-here/x' starts with '~', but there is no such home"),
        (f"user_dir={'x' * 300}", "not a usable path"),
        ("output_dir=~nobody-here/x", "output_dir = '~nobody-here/x' (command line): '~nobody-here/x' starts with '~'"),
        (
            "predict.output=~nobody-here/x",
            "(command line): '~nobody-here/x' starts with '~', but there is no such home",
        ),
    ],
)
def test_every_mistake_is_one_line_with_key_and_origin(recipe: str, override: str, message: str) -> None:
    assert message in error(recipe, override)


def test_a_run_writes_below_the_home_folder(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load([recipe, "output_dir=~/runs/a", "predict.output=${output_dir}/p.jsonl"]).config
    assert (config.output_dir, config.predict.output) == (f"{tmp_path}/runs/a", f"{tmp_path}/runs/a/p.jsonl")
    assert load([recipe, "output_dir=./runs/~/"]).config.output_dir == "./runs/~/"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset: shapes", "model: missing; name one with model=NAME"),
        ("model: average", "dataset: missing; name one with dataset=NAME"),
        (
            "model: average\ndataset:\n  name: shapes\n  exampels: 2",
            "dataset.exampels (recipe.yaml:4): unknown key; did you mean",
        ),
        (
            "model: average\ndataset: shapes\nname: {a}",
            "'name' is a string, without keys of its own; quote it if it is text",
        ),
        ("model: average\ndataset: shapes\nname: {a} b", "recipe.yaml:3: not valid YAML: "),
        ("model: average\ndataset: shapes\nseed: x", "seed = 'x' (recipe.yaml:3): must be an integer"),
        ("model: averag", "model (recipe.yaml:1): no model is called 'averag'; did you mean 'average'?"),
        ("model: [average]", "model = ['average'] (recipe.yaml:1): give a registered name"),
    ],
)
def test_mistakes_in_files_name_file_and_line(write: Callable[[str], str], text: str, message: str) -> None:
    assert message in error(f"config={write(text)}")


def test_a_literal_dollar_brace_can_be_written(recipe: str) -> None:
    assert load([recipe, "name=\\${x}"]).config.name == "${x}"


def test_user_dir_is_imported_before_names_are_looked_up(write: Callable[..., str]) -> None:
    plugin = """
from dataclasses import dataclass
from villa.registry import register_trainer
from villa.trainers.base import TrainerConfig
from villa.trainers.standard import StandardTrainer

@dataclass
class PluginConfig(TrainerConfig):
    root: str = "???"
    sizes: "dict[str, int] | None" = None

@register_trainer("loader_plugin")
class Plugin(StandardTrainer):
    "A plug-in."

    Config = PluginConfig
"""
    write(plugin, "extra/loader_plugin_module.py")
    base = "model: average\ndataset: shapes\nbatch: {examples: 2}\ntraining: {epochs: 1}\n"
    write(f"user_dir: extra/loader_plugin_module.py\ntrainer: loader_plugin\n{base}", "sub/recipe.yaml")
    assert "trainer.root: missing; it must be a string" in error("config=sub/recipe.yaml")
    config = load(["config=sub/recipe.yaml", "trainer.root=here", "trainer.sizes.a=3"]).config
    assert (config.trainer.name, config.trainer.root, config.trainer.sizes) == ("loader_plugin", "here", {"a": 3})


def test_from_yaml_takes_a_path(recipe: str) -> None:
    assert from_yaml(Path("recipe.yaml")) == load([recipe]).config
