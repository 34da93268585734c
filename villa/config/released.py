"""The JSON configurations of UNITER's and VILLA's released training scripts, as recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from villa.errors import ConfigError
from villa.files import read_json
from villa.json_values import is_number

Options = Mapping[str, Any]
Recipe = dict[str, Any]

#: Task to data set, head, loss and metric.
TASKS = {
    "vqa": ("vqa", "classification", "binary_cross_entropy", "soft_accuracy"),
    "ve": ("snli_ve", "classification", "binary_cross_entropy", "soft_accuracy"),
    "nlvr2": ("nlvr2", "nlvr2_paired_attn", "cross_entropy", "accuracy"),
    "vcr": ("vcr", "multiple_choice", "cross_entropy", "vcr"),
    "itm": ("retrieval", "ranking", "margin_ranking", "retrieval"),
    "re": ("referring", "regions", "cross_entropy", "referring"),
}
#: Tasks whose scripts give the head a learning rate of its own (``lr_mul``).
_HEAD_RATES = ("vqa", "vcr", "re")
_NLVR2_HEADS = {"paired-attn": "nlvr2_paired_attn", "paired": "nlvr2_paired", "triplet": "nlvr2_triplet"}
_OPTIMIZERS = {"adamw": "bert_adamw", "adam": "adam", "adamax": "adamax"}


def read_options(path: Path) -> dict[str, Any]:
    """Read a configuration of the release (``config/train-vqa-base-4gpu-adv.json``, or ``log/hps.json`` of a run).

    Raises:
        DataError: it is missing or not JSON.
        ConfigError: it is not an object.
    """
    options = read_json(path, "configuration", "give one of the release")
    if not isinstance(options, dict):
        raise ConfigError(f"'{path}' is not a configuration of the release: it must be a JSON object")
    return options


def released_recipe(task: str, options: Options, sizes: Options, *, gpus: int = 1) -> Recipe:
    """Translate a released configuration; its relative paths stay as they are, below ``dataset.root: .``.

    Args:
        task: one of ``TASKS``.
        options: the script's options.
        sizes: what ``model_config`` names: the sizes of the transformer.
        gpus: processes of the released run; its batch is that of one process.

    Returns:
        A nested recipe.

    Raises:
        ConfigError: an option that the recipe needs is missing or of a form that the release does not have.
    """
    if task not in TASKS:
        raise ConfigError(f"task '{task}' is not one of the release (known: {', '.join(TASKS)})")
    if gpus < 1:
        raise ConfigError(f"gpus={gpus} is too small; give at least 1")
    dataset, head, loss, metric = TASKS[task]
    given = _Given(options)
    recipe: Recipe = {
        "name": f"{task} as released",
        "output_dir": given("output_dir", f"outputs/released/{task}"),
        "seed": given("seed", 42),
        "model": {"name": "uniter", "head": head, **_model(task, given, _Given(sizes))},
        "dataset": {"name": dataset, "root": ".", **_data(task, given)},
        "loss": {"name": loss},
        "trainer": _trainer(task, given),
        "optimizer": {
            "name": _OPTIMIZERS[given("optim", "adamw", of=_OPTIMIZERS)],
            "lr": given("learning_rate"),
            "betas": given.numbers("betas", [0.9, 0.98]),
            "weight_decay": given("weight_decay", 0.01),
            "grouping": "released",
            "head_lr_multiplier": given("lr_mul", 1.0) if task in _HEAD_RATES else 1.0,
        },
        "scheduler": {"name": "linear", "warmup": given("warmup_steps"), "floor": 1e-8},
        "batch": _batch(task, given, gpus),
        "training": {
            "updates": given("num_train_steps"),
            "clip_norm": None if given("grad_norm", 2.0) == -1 else given.number("grad_norm", 2.0),
            "precision": "fp16" if given("fp16", False) else "fp32",
            "workers": given("n_workers", 0),
        },
        "evaluation": {"metrics": [metric], "monitor": metric, "every": given("valid_steps", None)},
    }
    if task == "re" and given("train_loss", "cls") == "rank":
        recipe["loss"] = {
            "name": "region_ranking",
            "margin": given("margin", 0.2),
            "hard_ratio": given("hard_ratio", 0.3),
        }
    if task == "itm" and "hard_neg_size" in options:
        _as_mean(recipe, 2)  # the means of both directions are added
    elif gpus > 1 and task != "re":
        _as_mean(recipe, given.count("gradient_accumulation_steps", 1))
    if task == "itm":
        recipe["loss"]["margin"] = given("margin", 0.2)
        recipe["evaluation"]["examples"] = 1
    if task == "vcr":
        recipe["evaluation"]["examples"] = given("val_batch_size", 10)
    return recipe


class _Given:
    """Options that name the missing one."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(self, name: str, *default: Any, of: Mapping[str, Any] | None = None) -> Any:
        if name not in self.options and not default:
            raise ConfigError(f"the released configuration has no '{name}'; is it one of this task?")
        value = self.options.get(name, *default)
        if of is not None and not (isinstance(value, str) and value in of):
            raise self.wrong(name, value, f"known are {', '.join(of)}")
        return value

    def count(self, name: str, *default: int) -> int:
        """Return an option that is a number of things, at least one."""
        value = self(name, *default)
        if type(value) is not int or value < 1:
            raise self.wrong(name, value, "it must be a whole number of at least 1")
        return value

    def number(self, name: str, *default: float) -> Any:
        """Return an option that is computed with."""
        value = self(name, *default)
        if not is_number(value):
            raise self.wrong(name, value, "it must be a number")
        return value

    def numbers(self, name: str, default: Sequence[float]) -> list[float]:
        """Return an option that is a list of numbers."""
        value = self(name, default)
        if not (isinstance(value, list) and all(map(is_number, value))):
            raise self.wrong(name, value, "it must be a list of numbers")
        return [float(number) for number in value]

    def texts(self, name: str) -> list[str] | None:
        """Return an option that is a text or a list of texts; None where it is not given."""
        value = self(name, None)
        value = [value] if isinstance(value, str) else value
        if value is not None and not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
            raise self.wrong(name, value, "it must be a text or a list of texts")
        return value

    def wrong(self, name: str, value: object, needed: str) -> ConfigError:
        """Return the error that an option has a value of another form."""
        return ConfigError(f"the released configuration has {name}={value!r:.40}; {needed}")


def _model(task: str, given: _Given, sizes: _Given) -> Recipe:
    model: Recipe = {
        "checkpoint": given("checkpoint", None),
        "hidden_size": sizes("hidden_size"),
        "num_layers": sizes("num_hidden_layers"),
        "num_heads": sizes("num_attention_heads"),
        "intermediate_size": sizes("intermediate_size"),
        "max_positions": sizes("max_position_embeddings"),
        "hidden_dropout": given("dropout", 0.1),
        "attention_dropout": given("dropout", 0.1),
        "initializer_range": sizes("initializer_range", 0.02),
    }
    if task == "nlvr2":
        model["head"] = _NLVR2_HEADS[given("model", "paired", of=_NLVR2_HEADS)]
        model["type_vocab_size"] = 3 if given("use_img_type", True) else 2
    if task == "re" and given("mlp", 1) == 2:
        model["head"] = "regions_mlp"
    return model


def _data(task: str, given: _Given) -> Recipe:
    data: Recipe = {"max_text_length": given("max_txt_len", 60)}
    for split in ("train", "val", "test"):
        for kind, name in (("txt", "text"), ("img", "images")):
            listed = given.texts(f"{split}_{kind}_dbs")
            data[f"{split}_{name}"] = (given.texts(f"{split}_{kind}_db") or []) if listed is None else listed
    fixed = given("conf_th", 0.2) == -1
    data |= {"fixed_boxes": given("num_bb", 36)} if fixed and task != "re" else {}
    # The detected boxes of referring expressions keep the usual database whatever conf_th says of the training ones.
    data |= {} if fixed else {"box_threshold": given("conf_th", 0.2)}
    data |= {"max_boxes": given("max_bb", 100), "min_boxes": given("min_bb", 10)}
    data["compressed"] = given("compressed_db", False)
    if task == "itm":
        hard = "hard_neg_size" in given.options
        data |= {"negatives": "hard" if hard else "random", "negative_size": given("negative_size", 1)}
        data |= {"hard_negatives": given("hard_neg_size")} if hard else {}
        data["eval_images"] = given("inf_minibatch_size", 400)
    return data


def _trainer(task: str, given: _Given) -> Recipe:
    if not given("adv_training", False):
        return {"name": "standard"}
    named = set(given.texts("adv_modality") or [])
    if not named <= {"text", "image", "alter"} or not named - {"alter"}:
        raise given.wrong("adv_modality", given("adv_modality"), "known are text, image, alter")
    both = "alternating" if "alter" in named else "both"
    radius = given("adv_max_norm", 0) or None
    return {
        "name": "villa",
        "reference": "official",
        "modality": both if {"text", "image"} <= named else min(named - {"alter"}),
        "steps": given("adv_steps"),
        "norm": given("norm_type", "l2"),
        "text_step_size": given("adv_lr_txt", 0.0),
        "image_step_size": given("adv_lr_img", 0.0),
        "text_radius": radius,
        "image_radius": radius,
        "kl_weight": given("adv_kl_weight", 0.0),
        "kl_reduction": "mean" if task == "vcr" else "batchmean",
    }


def _batch(task: str, given: _Given, gpus: int) -> Recipe:
    size, accumulation = given.count("train_batch_size"), given.count("gradient_accumulation_steps", 1)
    whole = size * accumulation * gpus
    if task == "re":
        return {"examples": whole, "per_pass": size, "accumulation": "total"}
    if task == "itm" and "hard_neg_size" in given.options:
        return {"examples": 2 * whole, "per_pass": 1}
    if task == "itm":
        return {"examples": whole, "per_pass": size, "accumulation": "sum"}
    return {"tokens": whole, "per_pass": size, "accumulation": "sum", "multiple": 8, "drop_last": True}


def _as_mean(recipe: Recipe, summed: int) -> None:
    """Take the mean over examples where the release sums the means of ``summed`` micro-batches.

    Clipping and the optimiser's epsilon are divided by their number, so that the updates are the same. In contrast to
    the sum it does not depend on the number of processes: the release averages over its GPUs before it sums.
    """
    recipe["batch"]["accumulation"] = "mean"
    recipe["optimizer"]["eps"] = 1e-6 / summed
    if recipe["training"]["clip_norm"] is not None:
        recipe["training"]["clip_norm"] /= summed
