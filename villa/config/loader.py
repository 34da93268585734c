"""Load a recipe and the command line into one checked configuration, or one for each stage."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from villa.config.layers import beside, parse_overrides, read_inline, read_layers, read_text, take_text
from villa.config.options import build, recipe_options
from villa.config.printer import leaves
from villa.config.schema import VARIANTS, RunConfig
from villa.config.validate import TRAINING_RUNS, validate
from villa.config.values import DEFAULT, Layer, Origin, Value, show, texts
from villa.config.variants import Variant, choose, drop_foreign, lay_over, name_variants, preset
from villa.errors import ConfigError, DataError, about
from villa.plugins import load_user_dir

#: Run types that use a trained model and do not train.
READING = ("val", "test", "predict", "robustness", "probe", "attention")

_NOTHING = Value(None, Origin("default"))


def saved_recipe(overrides: Layer) -> list[Layer]:
    """Return the layers of the recipe saved in ``checkpoint.path``; without training, also an ``output_dir``.

    Args:
        overrides: the command line's values.

    Returns:
        The layers; none if the command line names no trained model.

    Raises:
        CheckpointError: the trained model does not exist or is damaged.
        ConfigError: it is to be trained further without a new ``output_dir``; or ``read_stored`` refuses its recipe.
    """
    from villa.hub.opening import open_model

    path, run_type, output = (overrides.get(key, _NOTHING) for key in ("checkpoint.path", "run_type", "output_dir"))
    if not path.data or not path.text:
        return []
    reads = run_type.text in READING
    if not reads and output.data is None:
        raise ConfigError(
            f"checkpoint.path='{path.text}' is to be trained on: give output_dir=..., where the new run goes"
        )
    source = open_model(path.text)
    layers = [_without_places(layer) for layer in source.recipe()]
    if not reads:
        return layers
    results = str(source.results(str(run_type.text)))
    return [*layers, {"output_dir": Value(results, Origin("for the results"), results)}]


def _without_places(layer: Layer) -> Layer:
    """Leave out what a folder from elsewhere must not choose: launcher, output file, and which weights to take."""
    left_out = ("launcher", "predict.output", "checkpoint.weights")
    return {key: value for key, value in layer.items() if not key.startswith(left_out)}


@dataclass(frozen=True)
class Loaded:
    """A configuration and the origins of its values.

    Attributes:
        config: the checked configuration; its variant sections are instances of the registered ``Config``.
        origins: origin of the value of each dotted key.
        notices: one line for each dropped value.
    """

    config: RunConfig
    origins: dict[str, Origin]
    notices: list[str] = field(default_factory=list)


def load(args: Iterable[str]) -> Loaded:
    """Load ``config=recipe.yaml`` with the dotted overrides ``section.option=value``.

    The order of precedence, lowest first: defaults, the presets of a section's ``reference``, included files, the
    recipe, the command line; overlays lie between (see ``lay_over``). Every ``user_dir`` is imported, relative to the
    working directory, even in a recipe.
    Without a recipe, ``run_type=val|test|predict checkpoint.path=...`` uses the one saved with the checkpoint.

    Args:
        args: the arguments; see ``parse_overrides``.

    Raises:
        ConfigError: anything that is wrong with them, in one line.
    """
    path, overrides = parse_overrides(args)
    files = saved_recipe(overrides) if path is None else read_layers(path)
    given = next((layer["stages"] for layer in (*files, overrides) if "stages" in layer), None)
    if given is not None:
        raise ConfigError(f"stages ({given.origin}): this recipe has several stages, but one run is wanted; name one")
    return assemble((*files, overrides))


def assemble(given_layers: Sequence[Layer]) -> Loaded:
    """Build one checked configuration from layers; a later layer wins.

    Raises:
        ConfigError: as for ``load``.
    """
    layers = [name_variants(layer) for layer in given_layers]
    user_dirs = import_user_dirs(layers)
    variants = {section: choose(section, layers) for section in VARIANTS}
    options = recipe_options({section: variant.config for section, variant in variants.items()})
    layers = [take_text(layer, options) for layer in layers]
    given, notices = drop_foreign(lay_over(layers, variants), variants)
    values = _preset_values(variants, given) | given
    if user_dirs is not None:
        values["user_dir"] = user_dirs
    config = build({section: variant.config for section, variant in variants.items()}, values)
    config.callbacks = _nested(config.callbacks)
    origins = {key: _origin(key, values) for key in leaves(config)}
    validate(config, origins)
    _find_home(config)
    _refuse_stored_addresses(config, origins)
    return Loaded(config, origins, notices)


def from_yaml(path: str | Path) -> RunConfig:
    """Load a recipe without overrides, such as the one saved with a checkpoint.

    Raises:
        ConfigError: as for ``load``.
    """
    return load([f"config={path}"]).config


def import_plugins(args: Iterable[str]) -> Layer:
    """Import the ``user_dir`` given by the arguments or their recipe; return the values of the arguments.

    Raises:
        ConfigError: the arguments, the recipe's file or the ``user_dir`` cannot be used.
    """
    path, overrides = parse_overrides(args)
    import_user_dirs([*(() if path is None else read_layers(path)), overrides])
    return overrides


def import_user_dirs(layers: Sequence[Layer]) -> Value | None:
    """Import every ``user_dir`` of the layers, in their order, before any name is looked up; null drops earlier ones.

    Nothing else in villa imports code from a path.

    Returns:
        The value of the option: a path, or a list of several; None if no layer has one.

    Raises:
        ConfigError: only a stored recipe names it; or it is not a plain path, does not exist or fails to import.
    """
    named: list[tuple[str | None, Value]] = []
    for value in (layer["user_dir"] for layer in layers if "user_dir" in layer):
        paths = value.data if isinstance(value.data, list) and value.data else [value.text]
        named = [] if value.data is None else [*named, *((path, value) for path in paths)]
    if not named:
        return None
    found: dict[str, Value] = {}
    for path, given in [(path, given) for path, given in named if not given.origin.stored] or named:
        if not isinstance(path, str) or path not in found:
            found[_imported(path, given)] = given
    last = [*found.values()][-1]
    return last if len(found) == 1 and not isinstance(last.data, list) else Value([*found], last.origin)


def _imported(path: object, given: Value) -> str:
    """Import a ``user_dir`` and return its path."""
    where = f"({given.origin})"
    if given.origin.stored:
        raise ConfigError(
            f"user_dir = {show(given.data)} {where}: code is not imported just because the recipe inside a "
            f"trained model names it; if you trust it, add user_dir={given.text or 'PATH'}"
        )
    if not isinstance(path, str) or not path or "${" in path:
        raise ConfigError(f"user_dir = {show(given.data)} {where}: give a plain path; it is read before ${{...}}")
    try:
        load_user_dir(path)
    except ConfigError as error:
        raise ConfigError(f"{error} {where}") from error
    except (DataError, OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"user_dir = {show(path)} {where}: not a usable path: {error}") from error
    return path


def _nested(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a mapping option with ``{name.option: value}`` as ``{name: {option: value}}``.

    An entry ``name: false`` stays, without options.
    """
    nested: dict[str, Any] = {}
    for key, value in entries.items():
        name, _, option = key.partition(".")
        before = nested.get(name)
        options = before if isinstance(before, dict) else {}
        if option:
            nested[name] = False if before is False else {**options, option: value}
        else:
            nested[name] = options if options and value in (True, None) else value
    return nested


def _find_home(config: RunConfig) -> None:
    """Replace ``~`` in the paths that a run writes to; other paths are opened by ``local_path`` or ``plain_path``."""
    from villa.files import from_home

    if config.output_dir.startswith("~"):
        config.output_dir = str(from_home(config.output_dir))
    if config.predict.output is not None and config.predict.output.startswith("~"):
        config.predict.output = str(from_home(config.predict.output))


def _refuse_stored_addresses(config: RunConfig, origins: Mapping[str, Origin]) -> None:
    """Refuse to download from URLs that only the recipe inside a trained model names."""
    from villa.files import refuse_addresses

    written: dict[bool, list[str]] = {True: [], False: []}
    for key, data in leaves(config).items():
        written[origins[key].stored].extend(texts(data))
    refuse_addresses(stored=written[True], given=written[False])


def _preset_values(variants: dict[str, Variant], given: Layer) -> Layer:
    """Return the values that override the defaults and yield to the user's: variant names and presets."""
    values: Layer = {}
    for section, variant in variants.items():
        values[f"{section}.name"] = Value(variant.name, variant.origin, variant.name)
        values |= preset(section, variant, given)
    return values


def _origin(key: str, values: Layer) -> Origin:
    while key and key not in values:
        key = key.rpartition(".")[0]
    return values[key].origin if key else DEFAULT


_PREFIX = re.compile(r"stage(\d+)\.(.+)")
#: Keys of the whole recipe that every stage has its own value of.
_PER_STAGE = ("stages", "name", "output_dir")
_STAGES = Origin("stages")


@dataclass(frozen=True)
class _Stage:
    """A stage before it is checked.

    Attributes:
        number: position among the stages, from 1.
        recipe: the layers of its own recipe.
        given: the layers of the recipe that lists the stages and of the command line.
    """

    number: int
    recipe: Sequence[Layer]
    given: Sequence[Layer]

    def sets(self, key: str) -> bool:
        """Return whether the key is given for this stage alone."""
        return any(f"stage{self.number}.{key}" in layer for layer in self.given)

    def layers(self, own: bool = False) -> list[Layer]:
        """Return all layers; values for this stage win over values for all stages.

        Args:
            own: include ``name`` and ``output_dir`` of the whole recipe.
        """
        given = (part for layer in self.given for part in (self._shared(layer, own), self._only(layer)))
        return [*self.recipe, *given]

    def _shared(self, layer: Layer, own: bool) -> Layer:
        left_out = ("stages",) if own else _PER_STAGE
        return {key: value for key, value in layer.items() if key not in left_out and not _PREFIX.fullmatch(key)}

    def _only(self, layer: Layer) -> Layer:
        start = f"stage{self.number}."
        return {key.removeprefix(start): value for key, value in layer.items() if key.startswith(start)}


def load_stages(args: Iterable[str], recipe: str | None = None) -> list[Loaded]:
    """Load a recipe like ``load``, but as one configuration for each of its ``stages`` if it lists any.

    ``stages`` lists recipes: paths relative to the listing file, or mappings of sections. Everything else in that file
    and on the command line applies to all stages and wins over their recipes; with the prefix ``stage2.`` it applies
    to the second stage alone. A stage's folder is ``stage<number>_<name>`` below ``output_dir``, which is by default
    what the first stage's recipe derives from the ``name`` of the whole. ``model.checkpoint`` of a later stage is the
    folder of the stage before, unless it is given for that stage.

    Args:
        args: the arguments; see ``parse_overrides``.
        recipe: YAML of a recipe made in code, in place of ``config=recipe.yaml``.

    Raises:
        ConfigError: the first problem found, in one line.
    """
    args = list(args)
    path, overrides = parse_overrides(args)
    files = [] if path is None else read_layers(path)
    if recipe is not None:
        files += read_text(recipe, Origin("recipe in code"))
    layers = [*files, overrides]
    listed = next((layer["stages"] for layer in reversed(layers) if "stages" in layer), None)
    if listed is None:
        return [load(args) if recipe is None else assemble(layers)]
    stages = [_Stage(i, recipe, layers) for i, recipe in enumerate(_recipes(listed), 1)]
    _check(layers, len(stages))
    root, loaded = "", list[Loaded]()
    for stage in stages:
        with about(f"stage {stage.number}"):
            root = root or _root(stage, Path(path or "run").stem)
            loaded.append(_load(stage, root, loaded[-1].config.output_dir if loaded else None))
    return loaded


def _recipes(listed: Value) -> list[list[Layer]]:
    """Read the layers of every stage's recipe."""
    items, where = listed.data, f"stages ({listed.origin})"
    if not (isinstance(items, list) and items and all(item and isinstance(item, str | dict) for item in items)):
        raise ConfigError(f"{where}: give a list of recipes, each the path of a YAML file or a mapping of its sections")
    recipes = []
    for item in items:
        with about(where):
            source = beside(listed.origin.source, item) if isinstance(item, str) and listed.origin.line else item
            recipes.append(read_layers(source) if isinstance(source, str) else read_inline(source, listed.origin))
        nested = next((layer["stages"] for layer in recipes[-1] if "stages" in layer), None)
        if nested is not None:
            raise ConfigError(f"{where}: a stage has stages itself ({nested.origin}); list them all in one recipe")
    return recipes


def _check(layers: Sequence[Layer], count: int) -> None:
    """Refuse options that make no sense for a series of training runs."""
    for key, value in (item for layer in layers for item in layer.items()):
        match = _PREFIX.fullmatch(key)
        if match and not 1 <= int(match[1]) <= count:
            raise ConfigError(f"{key} ({value.origin}): the recipe has the stages 1 to {count}")
        name = match[2] if match else key
        if name == "run_type" and value.data not in TRAINING_RUNS:
            raise ConfigError(
                f"{key} = {show(value.data)} ({value.origin}): stages only train; to use what one has made, give "
                "checkpoint.path=FOLDER without config"
            )
        if name == "checkpoint.path" and value.data is not None:
            raise ConfigError(f"{key} ({value.origin}): a stage starts from model.checkpoint; give that instead")


def _root(stage: _Stage, stem: str) -> str:
    """Return the folder of the whole recipe: ``output_dir`` of the first stage, given the recipe's name."""
    name: Layer = {"name": Value(stem, _STAGES, stem)}
    given = stage.layers(own=True)[len(stage.recipe) :]
    return assemble([*stage.recipe, name, *given]).config.output_dir


def _load(stage: _Stage, root: str, before: str | None) -> Loaded:
    top: Layer = {}
    if not stage.sets("output_dir"):
        folder = f"{_literal(root)}/stage{stage.number}_${{name}}"
        top["output_dir"] = Value(folder, _STAGES, folder)
    if before is not None and not stage.sets("model.checkpoint"):
        top["model.checkpoint"] = Value(_literal(before), _STAGES, _literal(before))
    return assemble([*stage.layers(), top])


def _literal(text: str) -> str:
    """Escape ``${`` so that it is not read as an interpolation."""
    return text.replace("${", "\\${")
