"""Released configurations as recipes: every task loads, and mistakes are one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from villa.config import RunConfig, from_yaml
from villa.convert.configurations import TASKS, read_options, released_recipe
from villa.errors import ConfigError, VillaError

#: ``config/uniter-base.json`` of the release.
SIZES = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "vocab_size": 28996,
}
#: What all released configurations have.
COMMON: dict[str, Any] = {
    "model_config": "uniter-base.json",
    "checkpoint": "villa-base.pt",
    "max_txt_len": 60,
    "conf_th": 0.2,
    "max_bb": 100,
    "min_bb": 10,
    "num_bb": 36,
    "train_batch_size": 5120,
    "val_batch_size": 10240,
    "gradient_accumulation_steps": 5,
    "learning_rate": 8e-5,
    "lr_mul": 10.0,
    "num_train_steps": 6000,
    "warmup_steps": 600,
    "valid_steps": 500,
    "optim": "adamw",
    "betas": [0.9, 0.98],
    "weight_decay": 0.01,
    "dropout": 0.1,
    "grad_norm": 2.0,
    "seed": 42,
    "fp16": True,
    "n_workers": 4,
}
ADVERSARY = {
    "adv_training": True,
    "adv_modality": ["text"],
    "adv_lr_txt": 1e-3,
    "adv_lr_img": 1e-3,
    "adv_steps": 3,
    "norm_type": "l2",
    "adv_max_norm": 0,
    "adv_kl_weight": 1.5,
}


def corpus(name: str, ratios: list[float], images: str = "/img/a/") -> dict[str, Any]:
    """A data set of a released configuration of pre-training, with the tasks of most of them."""
    tasks = ["itm", "mlm", "mrfr", "mrckl"][4 - len(ratios) :]
    return {"name": name, "db": [f"/txt/{name}.db/"], "img": [images], "tasks": tasks, "mix_ratio": ratios}


def held_out(name: str, images: str = "/img/a/") -> dict[str, Any]:
    return {key: value for key, value in corpus(name, [1, 1, 1, 1], images).items() if key != "mix_ratio"}


#: What only configurations of pre-training have: those of COCO and Visual Genome.
PRETRAINING: dict[str, Any] = {
    "mrm_prob": 0.15,
    "itm_neg_prob": 0.5,
    "itm_ot_lambda": 0.1,
    "train_datasets": [corpus("coco", [6, 8, 4, 4]), corpus("vg", [9, 12, 6, 6])],
    "val_datasets": [held_out("coco"), held_out("vg")],
}


def options(task: str, **changes: Any) -> dict[str, Any]:
    """A configuration of a task as the release writes it."""
    if task == "pretrain":
        return COMMON | PRETRAINING | changes
    images = "/img/vcr_gt_train/;/img/vcr_train/" if task == "vcr" else "/img/train/"
    listed = {"train_txt_dbs": ["/txt/a.db", "/txt/b.db"], "train_img_dbs": [images, images]}
    single = {"train_txt_db": "/txt/a.db", "train_img_db": images}
    data = listed if task in ("vqa", "vcr", "itm") else single
    data |= {"val_txt_db": "/txt/val.db", "val_img_db": images}
    hard = {"hard_neg_size": 31, "negative_size": 399} if task == "itm" else {}
    return COMMON | data | (ADVERSARY if task in ("vqa", "ve", "nlvr2", "vcr") else {}) | hard | changes


def convert(task: str, **changes: Any) -> dict[str, Any]:
    return released_recipe(task, options(task, **changes), SIZES)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("gpus", [1, 4])
def test_the_recipe_of_every_task_loads(task: str, gpus: int, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(released_recipe(task, options(task), SIZES, gpus=gpus)))
    config = from_yaml(str(file))
    assert isinstance(config, RunConfig)
    assert config.dataset.name == TASKS[task][0]
    assert config.training.updates == 6000
    assert config.model.hidden_size == 768
    texts = config.dataset.corpora["coco"]["val_text"] if task == "pretrain" else config.dataset.val_text
    assert texts == (["/txt/coco.db/"] if task == "pretrain" else ["/txt/val.db"])


def test_the_adversary_is_translated() -> None:
    trainer = convert("vqa", adv_modality=["image", "text"], norm_type="linf", adv_max_norm=0.08)["trainer"]
    assert trainer == {
        "name": "villa",
        "reference": "official",
        "modality": "both",
        "steps": 3,
        "norm": "linf",
        "text_step_size": 1e-3,
        "image_step_size": 1e-3,
        "text_radius": 0.08,
        "image_radius": 0.08,
        "kl_weight": 1.5,
        "kl_reduction": "batchmean",
    }
    assert convert("vcr")["trainer"]["kl_reduction"] == "mean"
    assert convert("vqa")["trainer"]["text_radius"] is None
    assert convert("vqa", adv_training=False)["trainer"] == {"name": "standard"}


@pytest.mark.parametrize(
    ("given", "modality"),
    [
        ("text", "text"),
        (["image"], "image"),
        (["text", "image"], "both"),
        (["text", "image", "alter"], "alternating"),
    ],
)
def test_modalities(given: Any, modality: str) -> None:
    assert convert("ve", adv_modality=given)["trainer"]["modality"] == modality


def test_lr_mul_is_that_of_the_scripts_that_use_it() -> None:
    multipliers = {task: convert(task)["optimizer"]["head_lr_multiplier"] for task in TASKS}
    assert multipliers == {task: 10.0 if task in ("vqa", "vcr", "re") else 1.0 for task in TASKS}


def test_heads_losses_and_boxes() -> None:
    assert convert("nlvr2", model="triplet", use_img_type=False)["model"]["head"] == "nlvr2_triplet"
    assert convert("nlvr2", use_img_type=False)["model"]["type_vocab_size"] == 2
    assert convert("re", mlp=2)["model"]["head"] == "regions_mlp"
    ranked = convert("re", train_loss="rank", margin=0.1, hard_ratio=0.5)["loss"]
    assert ranked == {"name": "region_ranking", "margin": 0.1, "hard_ratio": 0.5}
    assert convert("vqa", conf_th=-1)["dataset"]["fixed_boxes"] == 36
    assert "fixed_boxes" not in convert("re", conf_th=-1, num_bb=100)["dataset"]
    assert convert("vqa", grad_norm=-1)["training"]["clip_norm"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adv_modality": ["sound"]}, "adv_modality=..sound..; known are text, image, alter"),
        ({"adv_modality": ["alter"]}, "adv_modality"),
        ({"adv_modality": 3}, "adv_modality=3"),
        ({"adv_modality": [["text"]]}, "adv_modality"),
        ({"optim": "sgd"}, "optim='sgd'; known are adamw, adam, adamax"),
        ({"optim": ["adamw"]}, "optim"),
        ({"betas": 0.9}, "betas=0.9"),
        ({"betas": ["a", "b"]}, "betas"),
        ({"train_batch_size": "5120"}, "train_batch_size='5120'"),
        ({"gradient_accumulation_steps": None}, "gradient_accumulation_steps=None"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0; it must be a whole number of at least 1"),
        ({"grad_norm": "2"}, "grad_norm='2'"),
        ({"train_txt_dbs": 3}, "train_txt_dbs=3"),
    ],
)
def test_options_of_another_form_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        released_recipe("vqa", options("vqa", **changes), SIZES, gpus=4)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "missing", ["learning_rate", "num_train_steps", "train_batch_size", "warmup_steps", "adv_steps"]
)
def test_a_missing_option_is_named(missing: str) -> None:
    given = {name: value for name, value in options("vqa").items() if name != missing}
    with pytest.raises(ConfigError, match=f"has no '{missing}'; is it one of this task"):
        released_recipe("vqa", given, SIZES)


def test_pre_training_mixes_objectives_and_corpora_as_often_as_the_release() -> None:
    recipe = convert("pretrain", mrm_prob=0.3)
    data = recipe["dataset"]
    assert data["mix"] == {"itm_wra": 6, "mlm": 8, "mrfr": 4, "mrc_kl": 4}
    assert {name: fields["weight"] for name, fields in data["corpora"].items()} == {"coco": 1.0, "vg": 1.5}
    assert data["mask_probabilities"] == {"mrfr": 0.3, "mrc_kl": 0.3}  # that of words is fixed
    assert "mask_probability" not in data
    assert recipe["loss"] == {"name": "pretraining", "transport_weight": 0.1}
    assert recipe["run_type"] == "train"
    assert convert("pretrain", itm_ot_lambda=0)["dataset"]["mix"]["itm"] == 6
    assert recipe["batch"]["sampler"] == "released"


def test_pre_training_on_vcr_is_a_data_set_of_its_own(tmp_path: Path) -> None:
    images = "/img/vcr_gt_train/;/img/vcr_train/"
    vcr = {"train_datasets": [corpus("vcr", [2, 1, 1], images)], "val_datasets": [held_out("vcr", images)]}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(convert("pretrain", **vcr)))
    config = from_yaml(str(file))
    assert (config.dataset.name, config.dataset.train_images) == ("vcr_pretraining", [images])
    assert (config.dataset.mix, config.model.type_vocab_size) == ({"mlm": 2, "mrfr": 1, "mrc_kl": 1}, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_datasets": [corpus("a", [1, 1, 1, 1]), corpus("b", [1, 2, 1, 1])]}, "tasks of 'b' otherwise than"),
        ({"train_datasets": [corpus("a", [1, 1, 1, 1]), corpus("b", [1, 1, 1])]}, "tasks of 'b' otherwise than"),
        ({"train_datasets": []}, "must be a list of data sets"),
        ({"train_datasets": [corpus("a", [1] * 4)] * 2}, "with names of their own"),
        ({"train_datasets": [{**corpus("a", [1, 1]), "mix_ratio": [1]}]}, "a positive number for each of 2 tasks"),
        ({"train_datasets": [{**corpus("a", [1, 1]), "tasks": ["mlm", "vqa"]}]}, "tasks='vqa'; known are mlm, mrfr"),
        ({"val_datasets": [held_out("cc")]}, "val_datasets='cc'; it must be one of train_datasets: coco, vg"),
        ({"mrm_prob": 2}, "mrm_prob=2; it must be a share"),
    ],
)
def test_mixtures_that_cannot_be_said_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        convert("pretrain", **changes)
    assert "\n" not in str(raised.value)


def test_a_missing_size_and_an_unknown_task_are_named() -> None:
    with pytest.raises(ConfigError, match="has no 'hidden_size'"):
        released_recipe("vqa", options("vqa"), {})
    with pytest.raises(ConfigError, match="task 'gqa' is not one of the release"):
        released_recipe("gqa", options("vqa"), SIZES)


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2)
)


@settings(max_examples=300)
@example("vqa", "gradient_accumulation_steps", 0, 4)
@given(
    st.sampled_from(sorted(TASKS)), st.sampled_from(sorted(COMMON | ADVERSARY | PRETRAINING)), values, st.integers(1, 3)
)
def test_any_value_gives_a_recipe_or_one_line(task: str, name: str, value: Any, gpus: int) -> None:
    try:
        recipe = released_recipe(task, options(task, **{name: value}), SIZES, gpus=gpus)
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017 - most values give a recipe
    else:
        yaml.safe_dump(recipe)


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[1]", "object"), (None, "cannot read")])
def test_files_that_hold_no_options_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(VillaError, match=message) as raised:
        read_options(file)
    assert str(file) in str(raised.value)


def test_options_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(options("vqa")))
    assert read_options(tmp_path / "config.json") == options("vqa")
