"""Recipes with stages: several recipes in one, each of which starts from the weights of the one before."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from villa.config.loader import Loaded, assemble, load
from villa.config.overrides import parse_overrides
from villa.config.reader import beside, read_inline, read_layers
from villa.config.validate import TRAINING_RUNS
from villa.config.values import Layer, Origin, Value, show
from villa.errors import ConfigError, about

_PREFIX = re.compile(r"stage(\d+)\.(.+)")
#: Keys of the whole, which stages have of their own.
_OWN = ("stages", "name", "output_dir")
_STAGES = Origin("stages")


@dataclass(frozen=True)
class _Stage:
    """A stage before it is checked.

    Attributes:
        number: from 1.
        recipe: the layers of its own recipe.
        given: the layers above: of the recipe that lists the stages and of the command line.
    """

    number: int
    recipe: Sequence[Layer]
    given: Sequence[Layer]

    def sets(self, key: str) -> bool:
        """Whether the key is given for this very stage."""
        return any(f"stage{self.number}.{key}" in layer for layer in self.given)

    def layers(self, own: bool = False) -> list[Layer]:
        """All layers; what is given for this stage wins over what is given for all.

        Args:
            own: with the keys of the whole.
        """
        given = (part for layer in self.given for part in (self._shared(layer, own), self._only(layer)))
        return [*self.recipe, *given]

    def _shared(self, layer: Layer, own: bool) -> Layer:
        left_out = ("stages",) if own else _OWN
        return {key: value for key, value in layer.items() if key not in left_out and not _PREFIX.fullmatch(key)}

    def _only(self, layer: Layer) -> Layer:
        start = f"stage{self.number}."
        return {key.removeprefix(start): value for key, value in layer.items() if key.startswith(start)}


def load_stages(args: Iterable[str]) -> list[Loaded]:
    """Load a recipe like ``load``: one configuration, or one for each of its ``stages``.

    ``stages`` lists recipes: paths relative to the file that lists them, or mappings of sections. Everything else in
    that file, and on the command line, is for all stages and wins over their recipes; with ``stage2.`` before the
    key it is for the second stage alone. A stage's folder is ``stage<number>_<name>`` below ``output_dir``, which is
    by default what the first stage's recipe makes of the ``name`` of the whole. ``model.checkpoint`` of later stages
    is the folder of the stage before, unless it is given for that very stage.

    Args:
        args: the arguments; see ``parse_overrides``.

    Raises:
        ConfigError: anything that is wrong with them, in one line.
    """
    args = list(args)
    path, overrides = parse_overrides(args)
    files = [] if path is None else read_layers(path)
    layers = [*files, overrides]
    listed = next((layer["stages"] for layer in reversed(layers) if "stages" in layer), None)
    if listed is None:
        return [load(args)]
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
    """Refuse what cannot be meant for several runs in a row."""
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
    """Return the folder of the whole: the one that its name, or ``output_dir``, gives to the first stage."""
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
    """Protect ``${`` from being taken for an interpolation."""
    return text.replace("${", "\\${")
