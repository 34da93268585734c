"""Checks of options beyond their types, made before any data is touched."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from villa.config.options import LARGEST, build_options
from villa.config.printer import leaves
from villa.config.schema import VARIANTS, RunConfig
from villa.config.values import DEFAULT, Origin, Value, show
from villa.errors import ConfigError, DataError, nearest
from villa.files import from_home, is_url
from villa.registry import ATTACKS, CALLBACKS, METRICS, SHIFTS, TRACKERS, Registry, expand_shifts

TRAINING_RUNS = ("train", "train_val_test")
_POSITIVE = (
    "batch.examples",
    "batch.tokens",
    "batch.per_pass",
    "batch.bucket",
    "batch.multiple",
    "training.updates",
    "training.epochs",
    "training.clip_norm",
    "training.max_skips",
    "training.threads",
    "training.data_timeout",
    "evaluation.every",
    "evaluation.patience",
    "evaluation.examples",
    "checkpoint.every",
    "checkpoint.keep",
    "logging.every",
    "predict.top_k",
    "predict.examples",
    "predict.workers",
    "robustness.steps",
    "robustness.examples",
    "robustness.text.candidates",
    "probe.examples",
    "probe.most_types",
    "attention.examples",
    "attention.steps",
    "evaluation.robustness.every",
    "evaluation.robustness.steps",
    "evaluation.robustness.examples",
)
#: Most threads or processes; no machine has more cores, and asking torch for too many ends the process.
_MOST_OF_A_MACHINE = 10_000
_NOT_NEGATIVE = (
    "seed",
    "training.workers",
    "training.weight_perturbation.after",
    "robustness.restarts",
    "robustness.seed",
    "probe.seed",
)
#: With batch.tokens every epoch is cut into batches to count all updates.
_MOST_EPOCHS = 1_000_000
#: More passes would never finish.
_MOST_STEPS = 100_000
#: Examples of a page of attention.
_MOST_PICTURES = 100
_HEAD = re.compile(r"[1-9]\d{0,3}\.([1-9]\d{0,3}|mean)")
#: Layers are built one by one, which would take hours before memory runs out.
_LAYERS, _MOST_LAYERS = re.compile(r"model\..*layers"), 4096
#: Strategies that can write sharded checkpoints.
_SHARDING = ("single", "ddp", "fsdp")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?", re.ASCII)


def validate(config: RunConfig, origins: Mapping[str, Origin]) -> None:
    """Check the ranges of options and their combinations.

    Args:
        config: a configuration whose types are right.
        origins: origin of each value.

    Raises:
        ConfigError: the first problem found, with the options, their values and origins.
    """
    problems = (
        _ranges,
        _batch,
        _training,
        _evaluation,
        _robust_evaluation,
        _distributed,
        _run_type,
        _robustness,
        _probe,
        _attention,
        _callbacks,
    )
    for key, problem in (found for check in problems for found in check(config)):
        origin = origins.get(key, DEFAULT)
        raise ConfigError(f"{key} = {show(leaves(config).get(key))} ({origin}): {problem}")
    for section in VARIANTS:
        _check_variant(section, getattr(config, section), origins)


def _ranges(config: RunConfig) -> Iterator[tuple[str, str]]:
    values = leaves(config)
    for key in (*_POSITIVE, *_NOT_NEGATIVE):
        value, least = values[key], "positive" if key in _POSITIVE else "at least 0"
        if value is not None and not (0 <= value < LARGEST and (value or key in _NOT_NEGATIVE)):
            yield key, f"must be {least} and below 2^63"
    for key in ("training.threads", "training.workers", "predict.workers"):
        if (values[key] or 0) > _MOST_OF_A_MACHINE:
            yield key, f"must be at most {_MOST_OF_A_MACHINE:,}"
    if (config.training.epochs or 0) > _MOST_EPOCHS:
        yield "training.epochs", f"must be at most {_MOST_EPOCHS:,}; give training.updates for longer runs"
    for key, value in values.items():
        if _LAYERS.fullmatch(key) and isinstance(value, int) and value > _MOST_LAYERS:
            yield key, f"must be at most {_MOST_LAYERS:,}"
    if not _DEVICE.fullmatch(config.device):
        yield "device", "must be auto, cpu, cuda or cuda:N"
    if not config.output_dir.strip():
        yield "output_dir", "give a folder"
    for key in ("output_dir", "predict.output"):
        if is_url(str(values[key])):
            yield key, "is a URL; give a path on this machine"
        try:
            from_home(values[key] or "")
        except DataError as error:
            yield key, str(error)


def _batch(config: RunConfig) -> Iterator[tuple[str, str]]:
    batch = config.batch
    if batch.examples is not None and batch.tokens is not None:
        yield "batch.tokens", f"batch.examples is {batch.examples} too; give one of the two and set the other to null"
    if batch.sampler != "tight" and batch.tokens is None:
        problem = f"the sampler '{batch.sampler}' cuts by tokens: give batch.tokens, and set batch.examples to null"
        yield "batch.sampler", problem
    size = batch.tokens if batch.examples is None else batch.examples
    if size is None and config.run_type in TRAINING_RUNS:
        yield "batch.examples", "give the size of an update: batch.examples or batch.tokens"
    if size is not None and batch.per_pass is not None and batch.per_pass > size:
        unit = "tokens" if batch.examples is None else "examples"
        yield "batch.per_pass", f"must be at most batch.{unit} = {size}; it is the part that is on the device at once"


def _training(config: RunConfig) -> Iterator[tuple[str, str]]:
    training = config.training
    if config.run_type not in TRAINING_RUNS:
        return
    if training.updates is not None and training.epochs is not None:
        yield (
            "training.epochs",
            f"training.updates is {training.updates} too; give one of the two and set the other to null",
        )
    moved = training.weight_perturbation
    if not 0 <= moved.radius < float("inf"):
        yield "training.weight_perturbation.radius", "must be a finite number of at least 0"
    if moved.adaptive and moved.name != "sam":
        yield "training.weight_perturbation.adaptive", "is an option of training.weight_perturbation.name=sam"
    for modality, size in training.noise.sizes().items():
        if not 0 < size < float("inf"):
            yield f"training.noise.{modality}", "must be a finite number above 0; null for no noise"
    if training.ema is not None and not 0 < training.ema < 1:
        yield "training.ema", "must be a number between 0 and 1, such as 0.999; null keeps no average"
    for name, bound in training.clip_norms.items():
        if not 0 < bound < float("inf"):
            yield f"training.clip_norms.{name}", "must be a finite number above 0"
    if training.updates is None and training.epochs is None:
        yield "training.updates", "give the length of the training: training.updates or training.epochs"


def _evaluation(config: RunConfig) -> Iterator[tuple[str, str]]:
    evaluation = config.evaluation
    if len(set(evaluation.metrics)) < len(evaluation.metrics):
        yield "evaluation.metrics", "a metric is named twice"
    objectives: Collection[str] = getattr(config.dataset, "objectives", tuple)()
    best = {"loss": "min", **{f"{name}_loss": "min" for name in objectives if len(objectives) > 1}}
    for name in evaluation.metrics:
        try:
            best[name] = "max" if METRICS.get(name).higher_is_better else "min"
        except ConfigError as error:
            yield "evaluation.metrics", str(error)
    robust = evaluation.robustness
    if robust.attacks and evaluation.metrics and robust.every is None:  # a monitored value is one of every evaluation
        best |= {f"robust_{name}": best[name] for name in evaluation.metrics[:1] if name in best}
    if evaluation.monitor not in best:
        losses = "the loss" if len(objectives) < 2 else "the loss, that of an objective of the mixture,"
        hint = nearest(evaluation.monitor, best)
        yield "evaluation.monitor", f"must be one of {', '.join(best)}: {losses} or one of evaluation.metrics{hint}"
    elif best[evaluation.monitor] != evaluation.mode:
        yield (
            "evaluation.mode",
            f"evaluation.monitor={evaluation.monitor} needs evaluation.mode={best[evaluation.monitor]}",
        )
    if evaluation.patience is not None and (evaluation.every is None or evaluation.split is None):
        yield "evaluation.patience", "needs evaluation.every and evaluation.split: early stopping counts evaluations"


def _robust_evaluation(config: RunConfig) -> Iterator[tuple[str, str]]:
    evaluation = config.evaluation
    robust = evaluation.robustness
    if not robust.attacks:
        return
    yield from _registered("evaluation.robustness.attacks", robust.attacks, ATTACKS)
    if evaluation.split is None:
        yield "evaluation.robustness.attacks", "needs evaluation.split: it is the validation split that is attacked"
    if robust.every is not None and (evaluation.every is None or robust.every % evaluation.every):
        yield "evaluation.robustness.every", f"must be a multiple of evaluation.every = {evaluation.every}"
    if not 0 < robust.radius < float("inf"):
        yield "evaluation.robustness.radius", "give a number above 0"
    if robust.steps > _MOST_STEPS:
        yield "evaluation.robustness.steps", f"must be at most {_MOST_STEPS:,}"


def _registered(key: str, names: Collection[str], registry: Registry[Any]) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            registry.get(name)
        except ConfigError as error:
            yield key, str(error)


def _distributed(config: RunConfig) -> Iterator[tuple[str, str]]:
    distributed = config.distributed
    if distributed.reduce_each_pass and distributed.strategy in ("single", "ddp"):
        problem = f"is for strategies that share gradients (fsdp, fairscale_*), not for {distributed.strategy}"
        yield "distributed.reduce_each_pass", problem


def _run_type(config: RunConfig) -> Iterator[tuple[str, str]]:
    training = config.run_type in TRAINING_RUNS
    if not training and config.checkpoint.path is None:
        yield "checkpoint.path", f"run_type={config.run_type} needs the checkpoint to use"
    if not training and config.checkpoint.resume:
        yield "checkpoint.resume", f"run_type={config.run_type} does not train; use checkpoint.path instead"
    if config.checkpoint.sharded and config.distributed.strategy not in _SHARDING:
        yield (
            "checkpoint.sharded",
            (
                f"distributed.strategy={config.distributed.strategy} saves whole checkpoints only; use "
                f"checkpoint.sharded=false, or one of {', '.join(_SHARDING)}"
            ),
        )
    if config.run_type == "val" and config.evaluation.split is None:
        yield "evaluation.split", "run_type=val needs a split"


def _robustness(config: RunConfig) -> Iterator[tuple[str, str]]:
    robustness = config.robustness
    if config.run_type != "robustness":
        return
    for key in ("steps", "restarts"):
        if getattr(robustness, key) > _MOST_STEPS:
            yield f"robustness.{key}", f"must be at most {_MOST_STEPS:,}"
    yield from _registered("robustness.attacks", robustness.attacks, ATTACKS)
    yield from _registered("robustness.shifts", expand_shifts(robustness.shifts), SHIFTS)
    for key, allowed in (
        ("losses", ("task", "margin")),
        ("modalities", ("text", "image", "both")),
        ("attacks", None),
        ("shifts", None),
    ):
        given = getattr(robustness, key)
        if key == "shifts":
            given = expand_shifts(given)
        if len(set(given)) < len(given):
            yield f"robustness.{key}", "one is named twice"
        unknown = [name for name in given if allowed is not None and name not in allowed]
        if unknown:
            yield f"robustness.{key}", f"'{unknown[0]}' is none of {', '.join(allowed or ())}"
        if not given and key in ("losses", "attacks"):
            yield f"robustness.{key}", "give at least one"
    radii = robustness.radii
    if not radii or radii != sorted(set(radii)) or not 0 < radii[0] <= radii[-1] < float("inf"):
        yield "robustness.radii", "give ascending numbers above 0"
    budgets = robustness.text.budgets
    shares = all(0 < budget < 1 for budget in budgets)
    numbers = all(1 <= budget < LARGEST and budget == int(budget) for budget in budgets)
    if not budgets or budgets != sorted(set(budgets)) or not (shares or numbers):
        yield "robustness.text.budgets", "give ascending shares below 1, or ascending numbers of words from 1 up"
    if not -1 <= robustness.text.similarity <= 1:
        yield "robustness.text.similarity", "must be a cosine, from -1 to 1"
    if robustness.relative_to == "table" and robustness.scope != "token":
        yield "robustness.relative_to", "is the norm of a token: set robustness.scope=token"


def _callbacks(config: RunConfig) -> Iterator[tuple[str, str]]:
    yield from _registered("logging.trackers", config.logging.trackers, TRACKERS)
    for name, given in config.callbacks.items():
        try:
            callback_options(name, given)
        except ConfigError as error:
            key = f"callbacks.{name}"
            yield next((leaf for leaf in leaves(config) if leaf.startswith(f"{key}.")), key), str(error)


def callback_options(name: str, given: object) -> Any:
    """Return the options of a callback that a recipe names, or None if it is switched off.

    Args:
        name: its registered name.
        given: ``true``, ``false`` or a mapping of options.

    Raises:
        ConfigError: the callback is unknown, or an option is.
    """
    if not isinstance(given, bool | dict | None):
        raise ConfigError("give true, false, or a mapping of options")
    options = given if isinstance(given, dict) else {}
    if given is False:
        return None
    layer = {key: Value(value, Origin(f"callbacks.{name}")) for key, value in options.items()}
    return build_options(CALLBACKS.get(name).Config, layer, f"callback '{name}'")


def _probe(config: RunConfig) -> Iterator[tuple[str, str]]:
    probe = config.probe
    if config.run_type != "probe":
        return
    if probe.data != "generated" and probe.path is None:
        yield "probe.path", f"probe.data={probe.data} needs the folder or file of the data"
    if probe.data == "generated" and probe.path is not None:
        yield "probe.data", "generated data has no path; give flickr30k_entities, visual_genome, nlvr or lines"
    if not 0 < probe.overlap <= 1:
        yield "probe.overlap", "must be above 0 and at most 1"
    if probe.file is not None and "{id" not in probe.file:
        yield "probe.file", "has no place for the image's id; write {id} in it, or {id:12} for zeros in front"


def _attention(config: RunConfig) -> Iterator[tuple[str, str]]:
    attention = config.attention
    if config.run_type != "attention":
        return
    if attention.examples > _MOST_PICTURES:
        yield "attention.examples", f"must be at most {_MOST_PICTURES}: the page holds all maps of each"
    if attention.steps > _MOST_STEPS:
        yield "attention.steps", f"must be at most {_MOST_STEPS:,}"
    if not 0 < attention.radius < float("inf"):
        yield "attention.radius", "give a number above 0"
    for head in attention.heads:
        if not _HEAD.fullmatch(head):
            yield "attention.heads", f"'{head}' is no layer and head; write 3.2, or 3.mean, counted from 1"


def _check_variant(section: str, options: object, origins: Mapping[str, Origin]) -> None:
    """Run a section's own check; a message that starts with an option's name gets that option's origin."""
    check = getattr(options, "check", None)
    if not callable(check):
        return
    try:
        check()
    except ConfigError as error:
        message = str(error).removeprefix(f"{section}.")
        option = re.match(r"[\w.]*\w", message)
        origin = _origin(f"{section}.{option[0]}", origins) if option else None
        raise ConfigError(f"{section}.{message} ({origin})" if origin else f"{section}: {message}") from error


def _origin(key: str, origins: Mapping[str, Origin]) -> Origin | None:
    """Return the origin of an option, of its section, or of a value in it; None for an unknown option."""
    while "." in key:
        found = next((name for name in origins if name == key or name.startswith(f"{key}.")), None)
        if found is not None:
            return origins[found]
        key = key.rpartition(".")[0]
    return None
