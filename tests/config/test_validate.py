from collections.abc import Callable

import pytest

from villa.config import load
from villa.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["batch.tokens=5", "batch.examples=8"],
            "batch.tokens = 5 (command line): batch.examples is 8 too; give one of the two",
        ),
        (["batch.examples=null"], "batch.examples = null (command line): give the size of an update"),
        (["batch.per_pass=9"], "batch.per_pass = 9 (command line): must be at most batch.examples = 8"),
        (["batch.per_pass=0"], "must be positive"),
        (["batch.examples=null", "batch.tokens=4", "batch.per_pass=5"], "must be at most batch.tokens = 4"),
        (["training.updates=3", "training.epochs=2"], "training.epochs = 2 (command line): training.updates is 3 too"),
        (["training.updates=null"], "give the length of the training"),
        (["training.updates=-1"], "training.updates = -1 (command line): must be positive"),
        (["training.clip_norm=.nan"], "training.clip_norm = nan (command line): must be positive"),
        (["training.threads=100000"], "must be at most 10,000"),
        (["training.updates=null", "training.epochs=2000000"], "must be at most 1,000,000; give training.updates"),
        (
            ["model=lxmert", "model.cross_layers=5000"],
            "model.cross_layers = 5000 (command line): must be at most 4,096",
        ),
        (
            ["model=huggingface", "model.architecture=clip", "model.options={text_config: {num_hidden_layers: 5000}}"],
            "model.options.text_config.num_hidden_layers = 5000 (command line): must be at most 4,096",
        ),
        (["training.clip_norm=.inf"], "must be positive and below 2^63"),
        (["training.workers=-1"], "must be at least 0"),
        (["seed=-1"], "seed = -1 (command line): must be at least 0"),
        (["seed=0xffffffffffffffffff"], "below 2^63"),
        (["checkpoint.keep=0"], "checkpoint.keep = 0 (command line): must be positive"),
        (["device=cuda:x"], "device = 'cuda:x' (command line): must be auto, cpu, cuda or cuda:N"),
        (["device=gpu"], "must be auto, cpu, cuda or cuda:N"),
        (["output_dir=' '"], "give a folder"),
        (["evaluation.monitor=f1"], "evaluation.monitor = 'f1' (command line): must be one of loss, accuracy"),
        (
            ["evaluation.monitor=loss"],
            "evaluation.mode = 'max' (default): evaluation.monitor=loss needs evaluation.mode=min",
        ),
        (["evaluation.mode=min"], "evaluation.monitor=accuracy needs evaluation.mode=max"),
        (["evaluation.metrics=[accuracy, acuracy]"], "no metric is called 'acuracy'; did you mean 'accuracy'?"),
        (["evaluation.metrics=[accuracy, accuracy]"], "a metric is named twice"),
        (["distributed.reduce_each_pass=true"], "is for strategies that share gradients"),
        (["evaluation.patience=2"], "needs evaluation.every and evaluation.split"),
        (["run_type=test"], "checkpoint.path = null (default): run_type=test needs the checkpoint"),
        (["run_type=predict", "checkpoint.path=x", "checkpoint.resume=true"], "run_type=predict does not train"),
        (["run_type=val", "checkpoint.path=x", "evaluation.split=null"], "run_type=val needs a split"),
        (["trainer.kl_weight=-1"], "trainer.kl_weight is -1.0; it must be"),
        (["optimizer.lr=0"], "optimizer.lr"),
    ],
)
def test_senseless_combinations_are_refused(recipe: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([recipe, *overrides])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["batch.examples=null", "batch.tokens=64", "batch.per_pass=64"],
        ["training.updates=null", "training.epochs=1", "training.clip_norm=2.0"],
        ["evaluation.metrics=[]", "evaluation.monitor=loss", "evaluation.mode=min"],
        ["evaluation.patience=2", "evaluation.every=5"],
        ["run_type=test", "checkpoint.path=x", "training.updates=null", "batch.examples=null"],
        ["device=cuda:1", "seed=0", "training.threads=1"],
        ["checkpoint.resume=true"],
    ],
)
def test_sensible_combinations_pass(recipe: str, overrides: list[str]) -> None:
    load([recipe, *overrides])


def test_a_check_gets_the_origin_of_the_option_it_names(recipe: str, write: Callable[[str], str]) -> None:
    write("includes: recipe.yaml\ntrainer:\n  steps: 0\n", "bad.yaml")
    with pytest.raises(ConfigError, match=r"^trainer.steps is 0; .* \(bad.yaml:3\)$"):
        load(["config=bad.yaml"])
