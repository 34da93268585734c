"""A recipe and the command line to one checked configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from villa.config.build import build
from villa.config.overlays import lay_over
from villa.config.overrides import parse_overrides
from villa.config.printer import leaves
from villa.config.reader import read_layers
from villa.config.saved import saved_recipe
from villa.config.schema import VARIANTS, RunConfig
from villa.config.validate import validate
from villa.config.values import DEFAULT, Layer, Origin, Value, show, texts
from villa.config.variants import Variant, choose, drop_foreign, name_variants, preset
from villa.errors import ConfigError
from villa.plugins import load_user_dir


@dataclass(frozen=True)
class Loaded:
    """A configuration, and how it came about.

    Attributes:
        config: the checked configuration; its variant sections are instances of the registered ``Config``.
        origins: where the value of each dotted key came from.
        notices: what was left out, one line each.
    """

    config: RunConfig
    origins: dict[str, Origin]
    notices: list[str] = field(default_factory=list)


def load(args: Iterable[str]) -> Loaded:
    """Load ``config=recipe.yaml`` with the dotted overrides ``section.option=value``.

    The order of precedence, lowest first: defaults, the presets of a section's ``reference``, included files, the
    recipe, the command line; overlays lie between (see ``lay_over``). A relative ``user_dir`` is relative to the
    working directory, also in a recipe.
    Without a recipe, ``run_type=val|test|predict checkpoint.path=...`` takes the one saved with the checkpoint.

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
    """Make one checked configuration of layers; a later one wins.

    Raises:
        ConfigError: as for ``load``.
    """
    layers = [name_variants(layer) for layer in given_layers]
    import_user_dir(layers)
    variants = {section: choose(section, layers) for section in VARIANTS}
    given, notices = drop_foreign(lay_over(layers, variants), variants)
    values = _below(variants, given) | given
    config = build({section: variant.config for section, variant in variants.items()}, values)
    origins = {key: _origin(key, values) for key in leaves(config)}
    validate(config, origins)
    _refuse_stored_addresses(config, origins)
    return Loaded(config, origins, notices)


def from_yaml(path: str | Path) -> RunConfig:
    """Load a recipe without overrides, for example the one saved beside a checkpoint.

    Raises:
        ConfigError: as for ``load``.
    """
    return load([f"config={path}"]).config


def import_user_dir(layers: Sequence[Layer]) -> None:
    """Import the ``user_dir`` that wins in the layers, before any name is looked up.

    Nothing else in villa imports code by a path.

    Raises:
        ConfigError: only a stored recipe names it; or it is not a path as it stands, does not exist or fails to import.
    """
    given = next((layer["user_dir"] for layer in reversed(layers) if "user_dir" in layer), None)
    if given is None or given.data is None:
        return
    path = given.text
    if given.origin.stored:
        raise ConfigError(
            f"user_dir = {show(given.data)} ({given.origin}): code is not imported just because the recipe inside a "
            f"trained model names it; if you trust it, add user_dir={path or 'PATH'}"
        )
    if not path or "${" in path:
        raise ConfigError(
            f"user_dir = {show(given.data)} ({given.origin}): give a plain path; it is read before ${{...}}"
        )
    try:
        load_user_dir(path)
    except ConfigError as error:
        raise ConfigError(f"{error} ({given.origin})") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"user_dir = {show(path)} ({given.origin}): not a usable path: {error}") from error


def _refuse_stored_addresses(config: RunConfig, origins: Mapping[str, Origin]) -> None:
    """Let nothing be fetched from where only the recipe inside a trained model says."""
    from villa.files import refuse_addresses

    written: dict[bool, list[str]] = {True: [], False: []}
    for key, data in leaves(config).items():
        written[origins[key].stored].extend(texts(data))
    refuse_addresses(stored=written[True], given=written[False])


def _below(variants: dict[str, Variant], given: Layer) -> Layer:
    """Return what lies between the defaults and the user's values: variant names and presets."""
    values: Layer = {}
    for section, variant in variants.items():
        values[f"{section}.name"] = Value(variant.name, variant.origin, variant.name)
        values |= preset(section, variant, given)
    return values


def _origin(key: str, values: Layer) -> Origin:
    while key and key not in values:
        key = key.rpartition(".")[0]
    return values[key].origin if key else DEFAULT
