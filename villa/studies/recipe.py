"""The recipe of a study: what it varies, and what it asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from villa.config.layers import beside
from villa.config.values import Origin
from villa.config.yaml_text import parse, write
from villa.errors import ConfigError, nearest
from villa.files import read_text
from villa.recipes import locate, suggestion

#: Name of the only question of a study that asks none.
_HELP = "methods"
#: Option of a method: another one whose options and settings it has, too.
_LIKE = "like"
#: Key below which a file is read as one value.
_WHOLE = "study.of.methods"


@dataclass(frozen=True)
class Question:
    """A table of the study: methods against one of them.

    Attributes:
        title: the question.
        against: the method that the others are compared with.
        methods: the others.
    """

    title: str
    against: str
    methods: Sequence[str]


@dataclass(frozen=True)
class StudyRecipe:
    """A study.

    Attributes:
        name: title of the page.
        output_dir: folder of everything.
        recipe: path of the recipe of all runs.
        options: options of all runs.
        seeds: seeds of all runs.
        updates: optimiser steps at matched updates.
        updates_option: the option that sets them; ``stage2.training.updates`` for a recipe of two stages.
        match_compute: method whose operations at ``updates`` all others get at matched compute; None leaves that out.
        lengths: further numbers of updates of the first method, among which validation chooses its best.
        axes: by axis and value, the options of that value: data sets, backbones, shares of the data.
        methods: options of each method; the first is what others are compared with.
        settings: by method, the options of each setting that is tried, of which validation chooses one.
        search_seeds: seeds of the tries; by default all.
        questions: the tables.
        robustness: options of attacks on the trained models; None attacks none.
    """

    name: str
    output_dir: str
    recipe: str
    seeds: list[int]
    updates: int
    methods: dict[str, dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    updates_option: str = "training.updates"
    match_compute: str | None = None
    lengths: list[int] = field(default_factory=list)
    axes: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    settings: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    search_seeds: list[int] = field(default_factory=list)
    questions: dict[str, Question] = field(default_factory=dict)
    robustness: dict[str, Any] | None = None

    @property
    def base(self) -> str:
        """The method that others are compared with."""
        return next(iter(self.methods))

    def overrides(self, method: str, setting: str | None) -> list[str]:
        """Return the overrides of a method with a setting."""
        return written({**self.methods[method], **(self.settings[method][setting] if setting else {})})


def written(options: Mapping[str, Any]) -> list[str]:
    """Return options as arguments of ``villa_run``."""
    return [f"{key}={write(value)}" for key, value in options.items()]


def read_study(path: str) -> StudyRecipe:
    """Read the recipe of a study.

    Raises:
        ConfigError: it cannot be read, or does not make a study.
    """
    path = locate(path)
    if not Path(path).is_file():
        raise ConfigError(f"the study '{path}' does not exist{suggestion(path)}; give the path of a YAML file")
    tree = _tree(path)
    known = {each.name for each in fields(StudyRecipe)}
    for key in tree:
        if key not in known:
            raise ConfigError(
                f"{path}: a study has no '{key}'{nearest(key, known)} (it has: {', '.join(sorted(known))})"
            )
    for key in ("name", "output_dir", "recipe", "seeds", "updates", "methods"):
        if tree.get(key) in (None, "", [], {}):
            raise ConfigError(f"{path}: the study lacks '{key}'")
    tree["methods"], tree["settings"] = _inherited(path, tree["methods"], tree.get("settings") or {})
    tree["questions"] = _questions(path, tree)
    tree["recipe"] = beside(path, str(tree["recipe"]))
    study = StudyRecipe(**{key: value for key, value in tree.items() if value is not None})
    _check(path, study)
    return study


def _tree(path: str) -> dict[str, Any]:
    """Return the content of a file as nested mappings, also those that are empty: a method without options."""
    read = parse(read_text(Path(path)), lambda line: Origin(path, line), _WHOLE)[_WHOLE].data
    if not isinstance(read, dict):
        raise ConfigError(f"{path}: a study is a mapping of 'key: value' lines")
    return dict(read)


def _inherited(path: str, methods: Any, settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options and settings of all methods, with those that they are like."""
    _mapping(path, "methods", methods)
    _mapping(path, "settings", settings)
    options: dict[str, Any] = {}
    found = dict(settings)
    for name, own in methods.items():
        _mapping(path, f"methods.{name}", own or {})
        rest = {key: value for key, value in (own or {}).items() if key != _LIKE}
        like = str((own or {}).get(_LIKE, name))
        if like != name and like not in options:
            raise ConfigError(f"{path}: methods.{name} is like '{like}', which is none of the methods before it")
        options[name] = {**options.get(like, {}), **rest}
        if like in found:
            found.setdefault(name, found[like])
    return options, found


def _mapping(path: str, key: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {key} is {value!r:.60}; give a mapping")


def _questions(path: str, tree: Mapping[str, Any]) -> dict[str, Question]:
    methods = list(tree["methods"])
    asked = tree.get("questions") or {
        _HELP: {"title": f"What differs from {methods[0]}?", "against": methods[0], "methods": methods[1:]}
    }
    found = {}
    for name, question in asked.items():
        if not isinstance(question, dict) or question.keys() != {"title", "against", "methods"}:
            raise ConfigError(f"{path}: questions.{name} needs 'title', 'against' and 'methods', and nothing else")
        others = question["methods"] if isinstance(question["methods"], list) else [question["methods"]]
        for method in (question["against"], *others):
            _known(path, f"questions.{name}", method, methods)
        found[name] = Question(str(question["title"]), question["against"], others)
    return found


def _known(path: str, where: str, method: Any, methods: Sequence[str]) -> None:
    if method not in methods:
        raise ConfigError(f"{path}: {where} names '{method}', which is none of the methods ({', '.join(methods)})")


def _check(path: str, study: StudyRecipe) -> None:
    for key in ("seeds", "search_seeds", "lengths"):
        values = getattr(study, key)
        if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
            raise ConfigError(f"{path}: {key} = {values!r:.60}; give a list of whole numbers")
        if len(set(values)) < len(values):
            raise ConfigError(f"{path}: {key} = {values} has a number twice")
    if type(study.updates) is not int or study.updates < 1:
        raise ConfigError(f"{path}: updates = {study.updates!r:.60}; give a whole number of at least 1")
    if not set(study.search_seeds) <= set(study.seeds):
        raise ConfigError(f"{path}: search_seeds = {study.search_seeds} are not all among the seeds {study.seeds}")
    if study.match_compute is not None:
        _known(path, "match_compute", study.match_compute, list(study.methods))
    for method in study.settings:
        _known(path, "settings", method, list(study.methods))
    tries = {method: len(study.settings.get(method, {})) for method in study.methods}
    if len(set(tries.values())) > 1:
        counts = ", ".join(f"{method} {count}" for method, count in tries.items())
        raise ConfigError(f"{path}: methods are compared fairly with as many settings to try for each ({counts})")
