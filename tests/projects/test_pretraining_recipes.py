"""The recipes of pre-training and of both stages: the values of the release and of the paper, and that they run."""

import json
from pathlib import Path
from typing import Any

import pytest
from recipe_runs import PROJECTS, argument

from villa.cli.run import main
from villa.config import RunConfig, load, load_stages

pytestmark = pytest.mark.usefixtures("elsewhere")


def found(pattern: str) -> list[str]:
    paths = (path for path in PROJECTS.glob(pattern) if not path.name.startswith("_"))
    return sorted(str(path.relative_to(PROJECTS).with_suffix("")) for path in paths)


WHOLE = [*(f"villa/pretrain/{name}" for name in ("base", "base_indomain", "large")), *found("villa/two_stage_*.yaml")]
SINGLE = [recipe for recipe in found("*/pretrain/*.yaml") if recipe not in WHOLE]
SHORT = (
    "training.updates=3",
    "dataset.synthetic_examples=32",
    "logging.tensorboard=false",
    "logging.figures=false",
    "logging.progress=off",
)


def stages(recipe: str, *overrides: str) -> list[RunConfig]:
    return [loaded.config for loaded in load_stages([argument(recipe), *overrides])]


@pytest.mark.parametrize("recipe", [*SINGLE, *WHOLE])
def test_a_recipe_says_how_to_run_it_and_becomes_small(recipe: str) -> None:
    head = (PROJECTS / f"{recipe}.yaml").read_text(encoding="utf-8").partition("\n\n")[0]
    assert f"# villa_run config=projects/{recipe}.yaml\n" in head
    assert f"villa_run config=projects/{recipe}.yaml dataset.synthetic=true" in head
    name = recipe.replace("/", "_")
    for config in stages(recipe, "dataset.synthetic=true"):
        assert config.output_dir.startswith(f"outputs/synthetic/{name}/")
        assert (config.model.hidden_size, config.scheduler.total, config.scheduler.before) == (64, None, 0)
        assert config.training.updates <= 180


#: Per recipe: tokens of a GPU, GPUs, micro-batches, learning rate, updates, warm-up, clipping, mix, weights of corpora.
RELEASED: dict[str, tuple[Any, ...]] = {
    "indomain": (10240, 8, 2, 5e-5, 200000, 10000, 5.0, (2, 2, 1, 1), {"coco": 1, "vg": 1}),
    "alldata": (10240, 8, 6, 5e-5, 200000, 10000, 5.0, (3, 4, 2, 2), {"coco": 2, "vg": 3, "cc": 3, "sbu": 2}),
    "alldata_large": (6144, 16, 4, 5e-5, 500000, 10000, 5.0, (3, 4, 2, 2), {"coco": 2, "vg": 3, "cc": 3, "sbu": 2}),
    "vcr": (6144, 4, 4, 3e-5, 45000, 4500, None, (0, 2, 1, 1), {}),
    "vcr_large": (6144, 4, 4, 3e-5, 45000, 4500, None, (0, 10, 1, 1), {}),
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_recipe_has_the_values_of_the_released_configuration(name: str) -> None:
    tokens, gpus, passes, rate, updates, warmup, clip, mix, corpora = RELEASED[name]
    config = load([argument(f"uniter/pretrain/{name}")]).config
    assert (config.batch.tokens, config.batch.per_pass) == (tokens * gpus * passes, tokens)
    assert (config.optimizer.lr, config.training.updates, config.scheduler.warmup) == (rate, updates, warmup)
    assert config.training.clip_norm == (None if clip is None else pytest.approx(clip / passes, rel=1e-3))
    assert config.optimizer.eps == pytest.approx(1e-6 / passes, rel=1e-3)
    assert tuple(config.dataset.mix.get(name, 0) for name in ("itm_wra", "mlm", "mrfr", "mrc_kl")) == mix
    given = getattr(config.dataset, "corpora", {})
    assert {name: corpus.get("weight", 1) for name, corpus in given.items()} == corpora
    assert config.model.size == ("large" if name.endswith("large") else "base")
    assert (config.run_type, config.model.head, config.trainer.name) == ("train", "pretraining", "standard")
    assert config.dataset.max_text_length == (220 if name.startswith("vcr") else 60)


def test_the_products_of_mix_and_weights_are_the_released_ratios() -> None:
    config = load([argument("uniter/pretrain/alldata")]).config
    ratios = {
        corpus: [config.dataset.mix[name] * fields["weight"] for name in ("itm_wra", "mlm", "mrfr", "mrc_kl")]
        for corpus, fields in config.dataset.corpora.items()
    }
    assert ratios == {"coco": [6, 8, 4, 4], "vg": [9, 12, 6, 6], "cc": [9, 12, 6, 6], "sbu": [6, 8, 4, 4]}


@pytest.mark.parametrize("name", ["indomain", "alldata", "alldata_large", "vcr", "vcr_large"])
def test_adversarial_pretraining_differs_from_standard_in_the_trainer_schedule_and_start(name: str) -> None:
    config, plain = (load([argument(f"{project}/pretrain/{name}")]).config for project in ("villa", "uniter"))
    assert (config.dataset, config.batch, config.loss, config.optimizer) == (
        plain.dataset,
        plain.batch,
        plain.loss,
        plain.optimizer,
    )
    trainer = config.trainer
    assert (trainer.name, trainer.modality, trainer.steps) == ("villa", "alternating", 3)
    assert trainer.objectives == ["mlm", "itm", "itm_wra"]
    assert (trainer.text_step_size, trainer.image_step_size, trainer.kl_weight) == (1e-3, 1e-3, 1.5)


@pytest.mark.parametrize(
    ("recipe", "standard", "adversarial"),
    [("base", 100000, 100000), ("base_indomain", 100000, 100000), ("large", 425000, 75000)],
)
def test_the_schedule_of_the_paper_follows_one_learning_rate(recipe: str, standard: int, adversarial: int) -> None:
    from villa.registry import SCHEDULERS

    first, second = stages(f"villa/pretrain/{recipe}")
    assert (first.training.updates, second.training.updates) == (standard, adversarial)
    assert (first.trainer.name, second.trainer.name) == ("standard", "villa")
    assert second.model.checkpoint == first.output_dir
    one, two = (SCHEDULERS.get(c.scheduler.name)(c.scheduler, c.training.updates) for c in (first, second))
    assert one.factor(10000) == 1.0
    assert two.lr(1.0, 1) == pytest.approx(one.lr(1.0, standard) - 1 / (standard + adversarial - 10000))
    assert two.lr(1.0, adversarial) == pytest.approx(second.scheduler.floor)


@pytest.mark.parametrize("recipe", [name for name in WHOLE if "two_stage" in name])
def test_the_whole_of_villa_ends_with_adversarial_finetuning_on_the_task(recipe: str) -> None:
    *before, last = stages(recipe)
    task = recipe.partition("two_stage_")[2]
    assert last.trainer == load([argument(f"villa/paper/{task}")]).config.trainer
    assert [config.run_type for config in before] == ["train"] * len(before)
    assert last.run_type == "train_val_test"
    assert [c.dataset.name for c in before] == ["pretraining"] * 2 + ["vcr_pretraining"] * (task == "vcr")
    for earlier, later in zip(before, [*before[1:], last], strict=True):
        assert later.model.checkpoint == earlier.output_dir


@pytest.mark.parametrize("recipe", ["uniter/pretrain/alldata", "villa/pretrain/indomain", "villa/pretrain/vcr"])
def test_a_recipe_runs_on_generated_data(recipe: str) -> None:
    assert main([argument(recipe), "dataset.synthetic=true", "output_dir=run", *SHORT]) == 0
    records = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    values = records[-1]
    assert values["kind"] == "val"
    assert {"mlm_loss", "mrfr_loss", "mrc_kl_loss", "mlm_accuracy", "mrc_accuracy"} <= values.keys()
    assert ("itm_accuracy" in values) is ("vcr" not in recipe)


def test_both_stages_run_on_generated_data() -> None:
    assert main([argument("villa/two_stage_vqa"), "dataset.synthetic=true", "output_dir=run", *SHORT]) == 0
    names = sorted(path.name for path in Path("run").iterdir())
    assert names == ["stage1_uniter_pretrain_alldata", "stage2_villa_pretrain_alldata", "stage3_villa_paper_vqa"]
    assert "test" in json.loads((Path("run") / names[-1] / "metrics.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in [*WHOLE, *SINGLE] if name != "villa/two_stage_vqa"])
def test_every_recipe_runs_on_generated_data(recipe: str) -> None:
    assert main([argument(recipe), "dataset.synthetic=true", "output_dir=run", *SHORT]) == 0
