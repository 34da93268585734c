"""Convert the JSON configurations of UNITER's and VILLA's released training scripts to recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isclose
from pathlib import Path
from typing import Any

from villa.errors import ConfigError
from villa.files import read_json
from villa.json_values import is_number

Options = Mapping[str, Any]
Recipe = dict[str, Any]

#: Data set, head, loss and metric of each task.
TASKS = {
    "vqa": ("vqa", "classification", "binary_cross_entropy", "soft_accuracy"),
    "ve": ("snli_ve", "classification", "binary_cross_entropy", "soft_accuracy"),
    "nlvr2": ("nlvr2", "nlvr2_paired_attn", "cross_entropy", "accuracy"),
    "vcr": ("vcr", "multiple_choice", "cross_entropy", "vcr"),
    "itm": ("retrieval", "ranking", "margin_ranking", "retrieval"),
    "re": ("referring", "regions", "cross_entropy", "referring"),
    "pretrain": ("pretraining", "pretraining", "pretraining", "loss"),
}
#: Tasks whose scripts multiply the head's learning rate (``lr_mul``).
_HEAD_RATES = ("vqa", "vcr", "re")
_NLVR2_HEADS = {"paired-attn": "nlvr2_paired_attn", "paired": "nlvr2_paired", "triplet": "nlvr2_triplet"}
#: Our objective for the start of a released task's name, longer ones first.
_OBJECTIVES = {"mlm": "mlm", "mrfr": "mrfr", "mrckl": "mrc_kl", "mrc": "mrc", "itm": "itm"}
_REGION_OBJECTIVES = ("mrfr", "mrc_kl", "mrc")
_OPTIMIZERS = {"adamw": "bert_adamw", "adam": "adam", "adamax": "adamax"}


def read_options(path: Path) -> dict[str, Any]:
    """Read a released configuration (``config/train-vqa-base-4gpu-adv.json``, or ``log/hps.json`` of a run).

    Raises:
        DataError: it is missing or not JSON.
        ConfigError: it is not an object.
    """
    options = read_json(path, "configuration", "give one of the release")
    if not isinstance(options, dict):
        raise ConfigError(f"'{path}' is not a configuration of the release: it must be a JSON object")
    return options


def released_recipe(task: str, options: Options, sizes: Options, *, gpus: int = 1) -> Recipe:
    """Convert a released configuration to a recipe; relative paths stay unchanged, below ``dataset.root: .``.

    Args:
        task: one of ``TASKS``.
        options: the script's options.
        sizes: content of the file named by ``model_config``: the sizes of the transformer.
        gpus: processes of the released run, whose batch size is per process.

    Returns:
        A nested recipe.

    Raises:
        ConfigError: a required option is missing, or an option has an unknown form.
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
    if task == "pretrain":
        _complete_pretraining(recipe, given)
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
    """Released options with checked access."""

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
        """Return an option that is a positive integer."""
        value = self(name, *default)
        if type(value) is not int or value < 1:
            raise self.wrong(name, value, "it must be a whole number of at least 1")
        return value

    def number(self, name: str, *default: float) -> Any:
        """Return an option that is a number."""
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

    def share(self, name: str, default: float) -> float:
        """Return an option that is a probability."""
        value = self.number(name, default)
        if not 0 <= value <= 1:
            raise self.wrong(name, value, "it must be a share in [0, 1]")
        return float(value)

    def texts(self, name: str) -> list[str] | None:
        """Return an option that is a string or a list of strings as a list; None if it is not given."""
        value = self(name, None)
        value = [value] if isinstance(value, str) else value
        if value is not None and not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
            raise self.wrong(name, value, "it must be a text or a list of texts")
        return value

    def wrong(self, name: str, value: object, needed: str) -> ConfigError:
        """Return the error for an invalid value of an option."""
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
    for split in () if task == "pretrain" else ("train", "val", "test"):
        for kind, name in (("txt", "text"), ("img", "images")):
            listed = given.texts(f"{split}_{kind}_dbs")
            data[f"{split}_{name}"] = (given.texts(f"{split}_{kind}_db") or []) if listed is None else listed
    fixed = given("conf_th", 0.2) == -1
    data |= {"fixed_boxes": given("num_bb", 36)} if fixed and task != "re" else {}
    # Detected boxes of referring expressions use the usual database, whatever conf_th is for the training ones.
    data |= {} if fixed else {"box_threshold": given("conf_th", 0.2)}
    data |= {"max_boxes": given("max_bb", 100), "min_boxes": given("min_bb", 10)}
    data["compressed"] = given("compressed_db", False)
    if task == "itm":
        hard = "hard_neg_size" in given.options
        data |= {"negatives": "hard" if hard else "random", "negative_size": given("negative_size", 1)}
        data |= {"hard_negatives": given("hard_neg_size")} if hard else {}
        data["eval_images"] = given("inf_minibatch_size", 400)
    return data


def _complete_pretraining(recipe: Recipe, given: _Given) -> None:
    """Add corpora, objectives, metrics and masking probabilities to a pre-training recipe."""
    corpora = {name: _Given(fields) for name, fields in _named(given, "train_datasets").items()}
    mixes = {name: _mix(corpus, given) for name, corpus in corpora.items()}
    first = next(iter(mixes.values()))
    weights = {name: _proportion(mix, first) for name, mix in mixes.items()}
    odd = next((name for name, weight in weights.items() if weight is None), None)
    if odd is not None:
        raise ConfigError(
            f"the released configuration mixes the tasks of '{odd}' otherwise than those of '{next(iter(mixes))}': "
            "villa has one dataset.mix for all corpora, each with a weight; make the mix_ratio of one a multiple of "
            "the other's"
        )
    data, region_share = recipe["dataset"], given.share("mrm_prob", 0.15)
    data["mix"] = first
    data["mask_probabilities"] = {name: region_share for name in first if name in _REGION_OBJECTIVES}
    lists = {name: _lists("train", corpus) for name, corpus in corpora.items()}
    for name, fields in _named(given, "val_datasets").items():
        if name not in lists:
            raise given.wrong("val_datasets", name, f"it must be one of train_datasets: {', '.join(lists)}")
        lists[name] |= _lists("val", _Given(fields))
    if any(";" in path for listed in lists.values() for path in listed["train_images"]):  # "ground truth;detections"
        if len(lists) > 1:
            raise given.wrong("train_datasets", list(lists), "VCR is pre-trained on by itself")
        data |= {"name": "vcr_pretraining", **next(iter(lists.values()))}
        recipe["model"]["type_vocab_size"] = 4
    else:
        data["negative_probability"] = given.share("itm_neg_prob", 0.5)
        data["corpora"] = {name: {"weight": weights[name], **listed} for name, listed in lists.items()}
        recipe["loss"]["transport_weight"] = given.number("itm_ot_lambda", 0.0)
    recipe["run_type"] = "train"  # there is nothing to test
    recipe["evaluation"] |= {"metrics": ["mlm_accuracy", "itm_accuracy", "mrc_accuracy"], "mode": "min"}


def _named(given: _Given, option: str) -> dict[str, Options]:
    """Return an option that is a list of data sets, by their names."""
    value = given(option)
    objects = isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)
    names = [one.get("name") for one in value] if objects else []
    if not names or not all(isinstance(name, str) and name for name in names) or len({*names}) < len(names):
        raise given.wrong(option, value, "it must be a list of data sets with names of their own")
    return {one["name"]: one for one in value}


def _lists(split: str, corpus: _Given) -> Recipe:
    """Return the databases of a corpus."""
    return {f"{split}_{ours}": [*(corpus.texts(theirs) or [])] for theirs, ours in (("db", "text"), ("img", "images"))}


def _mix(corpus: _Given, given: _Given) -> dict[str, float]:
    """Return the relative frequency of each objective."""
    tasks, ratios = corpus.texts("tasks") or [], corpus.numbers("mix_ratio", [])
    if not tasks or len(tasks) != len(ratios) or min(ratios) <= 0:
        raise corpus.wrong("mix_ratio", ratios, f"it must be a positive number for each of {len(tasks)} tasks")
    mix: dict[str, float] = {}
    for task, ratio in zip(tasks, ratios, strict=True):
        name = next((ours for start, ours in _OBJECTIVES.items() if task.startswith(start)), None)
        if name is None:
            raise corpus.wrong("tasks", task, f"known are {', '.join(_OBJECTIVES)}")
        aligned = name == "itm" and given.number("itm_ot_lambda", 0.0) > 0
        mix["itm_wra" if aligned else name] = ratio
    return mix


def _proportion(mix: Mapping[str, float], of: Mapping[str, float]) -> float | None:
    """Return the factor by which ``mix`` is a multiple of ``of``, or None if it is not a multiple."""
    factor = next(iter(mix.values())) / of[next(iter(mix))] if mix.keys() == of.keys() else 0.0
    return factor if factor and all(isclose(mix[name], factor * of[name]) for name in of) else None


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
    cut = {"multiple": 8, "drop_last": True, "sampler": "released"}
    return {"tokens": whole, "per_pass": size, "accumulation": "sum", **cut}


def _as_mean(recipe: Recipe, summed: int) -> None:
    """Use the mean over examples where the released code sums the means of ``summed`` micro-batches.

    ``clip_norm`` and the optimiser's epsilon are divided by ``summed``, so that the updates are the same. Unlike the
    sum, the mean does not depend on the number of processes: the released code averages over GPUs before it sums.
    """
    recipe["batch"]["accumulation"] = "mean"
    recipe["optimizer"]["eps"] = 1e-6 / summed
    if recipe["training"]["clip_norm"] is not None:
        recipe["training"]["clip_norm"] /= summed
