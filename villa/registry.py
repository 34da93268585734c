"""Registries: map names in a recipe to classes, built-in or from plug-ins.

A plug-in only decorates a class with ``@register_model("mine")``. Built-ins are found by a table of names to modules,
so that importing ``villa`` imports no backbone and one broken optional package breaks nothing else.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Generic, TypeVar, cast

from villa import plugins
from villa.errors import ConfigError, nearest

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(Generic[T]):
    """Classes of one kind by name.

    Args:
        kind: what is registered, for messages: ``"model"``.
        base: ``"module:Class"`` that every registered class derives from; imported on first use.
        builtin: maps each built-in name to the module whose import registers it.
    """

    def __init__(self, kind: str, base: str, builtin: Mapping[str, str]) -> None:
        self.kind = kind
        self._base = base
        self._builtin = dict(builtin)
        self._classes: dict[str, type] = {}

    @property
    def base(self) -> type[T]:
        """The class that every registered class derives from."""
        module, _, name = self._base.partition(":")
        return cast("type[T]", getattr(importlib.import_module(module), name))

    def register(self, name: str) -> Callable[[C], C]:
        """Return a decorator that registers a class under ``name`` and returns it unchanged.

        Raises:
            ConfigError: the name is taken, or the class does not derive from the base of this kind.
        """

        def decorate(cls: C) -> C:
            base: type = self.base
            if not (isinstance(cls, type) and issubclass(cls, base)):
                label = getattr(cls, "__qualname__", repr(cls))
                raise ConfigError(f"{self.kind} '{name}': {label} does not derive from {self._base}")
            taken = self._classes.get(name)
            owner = taken.__module__ if taken else self._builtin.get(name, cls.__module__)
            if owner != cls.__module__ or (taken is not None and taken.__qualname__ != cls.__qualname__):
                where = f"{taken.__module__}.{taken.__qualname__}" if taken else owner
                raise ConfigError(f"{self.kind} '{name}' is already registered by {where}; choose another name")
            self._classes[name] = cls
            return cls

        return decorate

    def names(self) -> list[str]:
        """Return all known names, sorted."""
        return sorted({*self._builtin, *self._classes})

    def get(self, name: str) -> type[T]:
        """Return the class called ``name``, importing its module if it is a built-in.

        Raises:
            ConfigError: the name is unknown; the message lists the known names, the nearest one and broken plug-ins.
        """
        if name not in self._classes and name in self._builtin:
            importlib.import_module(self._builtin[name])
        failures = {} if name in self._classes else plugins.failures()
        if name not in self._classes:
            known = ", ".join(self.names())
            broken = "".join(f"; plug-in {p} failed to import: {why}" for p, why in failures.items())
            raise ConfigError(
                f"no {self.kind} is called '{name}'{nearest(name, self.names())} (known: {known}){broken}"
            )
        return cast("type[T]", self._classes[name])

    def builtin(self, name: str) -> str | None:
        """Return the module whose import registers a built-in name; None for other names."""
        return self._builtin.get(name)

    def summary(self, name: str) -> str:
        """Return the first line of the documentation of a known class; a built-in's is read, not imported.

        Raises:
            ImportError: the source of the built-in is not there, and it cannot be imported.
        """
        if name in self._classes:
            document = self._classes[name].__doc__
        else:
            document = _documents(self._builtin[name]).get(name) or self.get(name).__doc__
        return (document or "").partition("\n")[0]


@cache
def _documents(module: str) -> dict[str, str]:
    """Return the docstrings of the classes that a module's source registers, by name; none if it has no source.

    Importing all built-ins takes seconds, for most of them import torch.
    """
    import ast
    from pathlib import Path

    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return {}
    source = Path(spec.origin).read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for node in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for decorator in node.decorator_list:
            match decorator:
                case ast.Call(args=[ast.Constant(value=str(name))]):
                    found[name] = ast.get_docstring(node) or ""
    return found


def expand_shifts(names: Sequence[str]) -> list[str]:
    """Return names of shifts, each group replaced by its members."""
    return [member for name in names for member in SHIFT_GROUPS.get(name, (name,))]


MODELS: Registry[Any] = Registry(
    "model",
    "villa.models.base:Model",
    {
        "uniter": "villa.models.uniter.model",
        "text_classifier": "villa.models.text_classifier",
        "lxmert": "villa.models.lxmert",
        "lxmert_pretraining": "villa.models.lxmert_pretraining",
        "visual_bert": "villa.models.visual_bert",
        "vilt": "villa.models.vilt",
        "huggingface": "villa.models.huggingface.model",
    },
)
DATASETS: Registry[Any] = Registry(
    "dataset",
    "villa.datasets.base:TaskDataset",
    {
        "easy_vqa": "villa.datasets.own.easy_vqa",
        "jsonl": "villa.datasets.own.jsonl",
        **dict.fromkeys(("lxmert_vqa", "lxmert_gqa", "lxmert_nlvr2"), "villa.datasets.lxmert.task"),
        "nlvr": "villa.datasets.own.nlvr",
        "nlvr2": "villa.datasets.uniter.nlvr2",
        **dict.fromkeys(("pretraining", "vcr_pretraining"), "villa.datasets.uniter.pretraining"),
        "referring": "villa.datasets.uniter.referring",
        "retrieval": "villa.datasets.uniter.retrieval",
        "snli_ve": "villa.datasets.uniter.vqa",
        "vcr": "villa.datasets.uniter.vcr",
        "vqa": "villa.datasets.uniter.vqa",
    },
)
LOSSES: Registry[Any] = Registry(
    "loss",
    "villa.losses.base:Loss",
    {
        "binary_cross_entropy": "villa.losses.classification",
        "contrastive": "villa.losses.pretraining",
        "cross_entropy": "villa.losses.classification",
        "language_model": "villa.losses.classification",
        "margin_ranking": "villa.losses.ranking",
        "pretraining": "villa.losses.pretraining",
        "region_ranking": "villa.losses.ranking",
    },
)
TRAINERS: Registry[Any] = Registry(
    "trainer",
    "villa.trainers.base:Trainer",
    {
        "standard": "villa.trainers.standard",
        **dict.fromkeys(("fgm", "pgd"), "villa.trainers.pgd"),
        **dict.fromkeys(("fare", "tecoa"), "villa.trainers.fare"),
        "freelb": "villa.trainers.freelb",
        "noise": "villa.trainers.noise",
        "rdrop": "villa.trainers.rdrop",
        "smart": "villa.trainers.smart",
        "villa": "villa.trainers.villa",
    },
)
METRICS: Registry[Any] = Registry(
    "metric",
    "villa.evaluation.metrics:Metric",
    {
        **dict.fromkeys(("accuracy", "soft_accuracy"), "villa.evaluation.metrics"),
        "exact_match": "villa.evaluation.metrics",
        **dict.fromkeys(("consensus", "consistency", "subsets", "gqa_ood"), "villa.evaluation.groups"),
        **dict.fromkeys(("mlm_accuracy", "itm_accuracy", "mrc_accuracy"), "villa.evaluation.metrics"),
        "pair_retrieval": "villa.evaluation.retrieval",
        "referring": "villa.evaluation.metrics",
        "retrieval": "villa.evaluation.retrieval",
        "vcr": "villa.evaluation.metrics",
    },
)
OPTIMIZERS: Registry[Any] = Registry(
    "optimizer",
    "villa.engine.optimizers:OptimizerFactory",
    dict.fromkeys(("adamw", "adam", "adamax", "bert_adam", "bert_adamw"), "villa.engine.optimizers"),
)
SCHEDULERS: Registry[Any] = Registry(
    "scheduler",
    "villa.engine.schedules:Schedule",
    dict.fromkeys(("linear", "warmup_linear", "cosine", "constant", "noam"), "villa.engine.schedules"),
)
LAUNCHERS: Registry[Any] = Registry(
    "launcher",
    "villa.launch.base:Launcher",
    {"inline": "villa.launch.base", "local": "villa.launch.local", "slurm": "villa.launch.slurm"},
)
SUBMISSIONS: Registry[Any] = Registry(
    "submission",
    "villa.evaluation.submissions.base:Submission",
    {
        **dict.fromkeys(("vqa", "vcr", "nlvr2", "snli_ve", "gqa", "referring"), "villa.evaluation.submissions.tasks"),
        "retrieval": "villa.evaluation.submissions.retrieval",
    },
)
ATTACKS: Registry[Any] = Registry(
    "attack",
    "villa.analysis.attacks:Method",
    {
        **dict.fromkeys(("noise", "fgm", "pgd", "apgd"), "villa.analysis.attacks"),
        **dict.fromkeys(("synonym_swap", "masked_lm_swap", "misspelling", "hotflip"), "villa.analysis.word_attacks"),
        "finite_difference": "villa.analysis.slopes",
        "universal": "villa.analysis.universal",
    },
)
#: Names in ``robustness.shifts`` that stand for several.
SHIFT_GROUPS: dict[str, tuple[str, ...]] = {
    "corruptions": (
        *("gaussian_noise", "shot_noise", "impulse_noise"),
        *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
        *("snow", "frost", "fog", "brightness"),
        *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    )
}
SHIFTS: Registry[Any] = Registry(
    "shift",
    "villa.analysis.shifts:Shift",
    {
        **dict.fromkeys(
            ("word_dropout", "word_order", "region_dropout", "region_shuffle", "foreign_regions", "box_jitter"),
            "villa.analysis.shifts",
        ),
        **dict.fromkeys(("char_noise", "synonyms"), "villa.analysis.text_shifts"),
        **dict.fromkeys(SHIFT_GROUPS["corruptions"], "villa.analysis.corruptions"),
    },
)
TRACKERS: Registry[Any] = Registry(
    "tracker",
    "villa.tracking:Tracker",
    {
        **dict.fromkeys(("jsonl", "csv", "tensorboard"), "villa.tracking"),
        **dict.fromkeys(("wandb", "mlflow", "trackio"), "villa.trackers"),
    },
)
CALLBACKS: Registry[Any] = Registry("callback", "villa.engine.loop:Callback", {})
EXTRACTORS: Registry[Any] = Registry(
    "extractor",
    "villa.extraction.base:Extractor",
    {
        "bottom_up": "villa.extraction.bottom_up",
        **dict.fromkeys(("efficientnet_grid", "transformers", "timm"), "villa.extraction.backbones"),
        "transformers_detector": "villa.extraction.detectors",
    },
)

#: Every registry by the plural of its kind, as in ``villa_run --list``.
REGISTRIES: dict[str, Registry[Any]] = {
    "models": MODELS,
    "datasets": DATASETS,
    "losses": LOSSES,
    "trainers": TRAINERS,
    "metrics": METRICS,
    "optimizers": OPTIMIZERS,
    "schedulers": SCHEDULERS,
    "launchers": LAUNCHERS,
    "submissions": SUBMISSIONS,
    "attacks": ATTACKS,
    "shifts": SHIFTS,
    "callbacks": CALLBACKS,
    "trackers": TRACKERS,
    "extractors": EXTRACTORS,
}

register_model = MODELS.register
register_dataset = DATASETS.register
register_loss = LOSSES.register
register_trainer = TRAINERS.register
register_metric = METRICS.register
register_optimizer = OPTIMIZERS.register
register_scheduler = SCHEDULERS.register
register_launcher = LAUNCHERS.register
register_submission = SUBMISSIONS.register
register_attack = ATTACKS.register
register_shift = SHIFTS.register
register_callback = CALLBACKS.register
register_tracker = TRACKERS.register
register_extractor = EXTRACTORS.register
