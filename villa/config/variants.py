"""Variant sections: the registered class that each one names, its presets and its overlays; alternative options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from villa.config.options import Option, dataclass_options, find, recipe_options
from villa.config.schema import ALTERNATIVES, VARIANTS, RunConfig
from villa.config.values import DEFAULT, Layer, Origin, Value, show
from villa.errors import ConfigError, nearest, one_line
from villa.registry import REGISTRIES

#: Default variants of sections. A model and a data set must be named.
DEFAULT_NAMES = {
    "loss": "cross_entropy",
    "trainer": "standard",
    "optimizer": "adamw",
    "scheduler": "linear",
    "launcher": "inline",
}


@dataclass(frozen=True)
class Variant:
    """The registered class of a section.

    Attributes:
        name: its registered name.
        origin: where the name was given.
        config: its ``Config`` dataclass.
        since: index of the last layer that changed the name; options in earlier layers belong to another variant.
    """

    name: str
    origin: Origin
    config: type
    since: int


def name_variants(layer: Layer) -> Layer:
    """Return the layer with ``trainer: freelb`` written as ``trainer: {name: freelb}``.

    Raises:
        ConfigError: a variant section is neither a name nor a mapping.
    """
    named: Layer = {}
    for key, value in layer.items():
        if key in VARIANTS and value.written is not None and value.written.problem:
            raise ConfigError(value.written.problem)
        if key in VARIANTS and not (isinstance(value.data, str) and value.data):
            known = ", ".join(REGISTRIES[VARIANTS[key]].names())
            raise ConfigError(
                f"{key} = {show(value.data)} ({value.origin}): give a registered name, or a mapping with one "
                f"(known: {known})"
            )
        named[f"{key}.name" if key in VARIANTS else key] = value
    return named


def choose(section: str, layers: Sequence[Layer]) -> Variant:
    """Find the variant of a section: the last name given, or the default.

    Raises:
        ConfigError: a required name is missing, unknown, or its module cannot be imported.
    """
    name, origin, since = DEFAULT_NAMES.get(section, ""), DEFAULT, 0
    for index, layer in enumerate(layers):
        given = layer.get(f"{section}.name")
        if given is not None:
            text = given.text if given.text is not None else show(given.data)
            since = index if text != name and name else since
            name, origin = text, given.origin
    registry = REGISTRIES[VARIANTS[section]]
    if not name:
        _refuse_misspelt(layers)
        known = ", ".join(registry.names())
        raise ConfigError(f"{section}: missing; name one with {section}=NAME or in the recipe (known: {known})")
    try:
        return Variant(name, origin, registry.get(name).Config, since)
    except ImportError as error:
        raise ConfigError(f"{section} = '{name}' ({origin}): cannot be imported: {one_line(error)}") from error
    except ConfigError as error:
        raise ConfigError(f"{section} ({origin}): {error}") from error


def _refuse_misspelt(layers: Sequence[Layer]) -> None:
    """Refuse a key that was meant to name the recipe or a section, which are missed first."""
    known = ["config", *(field.name for field in fields(RunConfig))]
    for layer in reversed(layers):
        for key, value in layer.items():
            head = key.partition(".")[0]
            if head not in known and (hint := nearest(head, known)):
                raise ConfigError(f"{key} ({value.origin}): unknown key{hint}")


def drop_foreign(layers: Sequence[Layer], variants: Mapping[str, Variant]) -> tuple[Layer, list[str]]:
    """Merge the layers, dropping options of a replaced variant that the chosen one does not have.

    Returns:
        The merged leaves, and a notice for each dropped one.
    """
    merged: Layer = {}
    notices: list[str] = []
    known = {section: dataclass_options(variant.config) for section, variant in variants.items()}
    for index, layer in enumerate(layers):
        for key, value in layer.items():
            section, _, rest = key.partition(".")
            variant = variants.get(section)
            if variant is not None and index < variant.since and not _knows(known[section], rest):
                notices.append(f"dropped {key} ({value.origin}): not an option of {section} '{variant.name}'")
            else:
                merged[key] = value
    return merged, notices


def preset(section: str, variant: Variant, values: Layer) -> Layer:
    """Return the options that the section's ``preset`` or ``reference`` sets, from the ``PRESETS`` of its ``Config``.

    Raises:
        ConfigError: no preset has that name.
    """
    presets: Mapping[str, Mapping[str, Any]] | None = getattr(variant.config, "PRESETS", None)
    if presets is None:
        return {}
    options = dataclass_options(variant.config)
    name = "preset" if "preset" in options else "reference"
    key = f"{section}.{name}"
    given = values.get(key, Value(options[name].default, DEFAULT))
    if given.data is None:
        return {}
    if given.data not in list(presets):
        raise ConfigError(
            f"{key} = {show(given.data)} ({given.origin}): {section} '{variant.name}' has no such preset"
            f"{nearest(str(given.data), presets)} (known: {', '.join(presets)})"
        )
    origin = Origin(f"preset '{given.data}'")
    return {f"{section}.{name}": Value(data, origin) for name, data in presets[given.data].items()}


def _knows(options: Mapping[str, object], key: str) -> bool:
    return any(f"{option}.".startswith(f"{key}.") or key.startswith(f"{option}.") for option in options)


@dataclass(frozen=True)
class Overlay:
    """Values of any section that an option brings along; a ``Config`` lists its ``OVERLAYS``.

    Attributes:
        when: values that the section's options must have; the first one turns the overlay on.
        values: values by dotted key. A section's values are left out together if its class lacks one of them, because
            they belong together (a width and the number of heads).
    """

    when: Mapping[str, Any]
    values: Mapping[str, Any]


def lay_over(layers: Sequence[Layer], variants: Mapping[str, Variant]) -> list[Layer]:
    """Return the layers with the active overlays, each directly below the layer that turns it on.

    So ``dataset.synthetic=true`` on the command line wins over all files and loses to the other arguments, and a file
    with ``synthetic: true`` (such as a saved recipe) keeps its own values. Of two ``ALTERNATIVES``, the one in the
    later layer replaces the other.
    """
    below: dict[int, Layer] = {}
    options = recipe_options({section: variant.config for section, variant in variants.items()})
    for section, variant in variants.items():
        for overlay in getattr(variant.config, "OVERLAYS", ()):
            found = {name: _find(section, variant, name, layers) for name in overlay.when}
            if all(found[name][1] == wanted for name, wanted in overlay.when.items()):
                name, wanted = next(iter(overlay.when.items()))
                origin = Origin(f"{section}.{name}={show(wanted)}")
                values = {key: Value(data, origin) for key, data in _fitting(overlay.values, options).items()}
                below.setdefault(found[name][0], {}).update(values)
    laid: list[Layer] = []
    given: Layer = {}
    for index, layer in enumerate(layers):
        laid.append({})
        for values in (below.get(index, {}), layer):
            laid[-1] |= _replaced(values, given) | values
            given |= laid[-1]
    return laid


def _replaced(layer: Layer, given: Layer) -> Layer:
    """Return null for every option of those given before whose alternative the layer gives in its place."""
    nulls: Layer = {}
    for pair in ALTERNATIVES:
        for own, other in (pair, pair[::-1]):
            if _is_given(own, layer) and _is_given(other, given) and other not in layer:
                nulls[other] = Value(None, layer[own].origin)
    return nulls


def _is_given(key: str, layer: Layer) -> bool:
    return key in layer and layer[key].data is not None


def _find(section: str, variant: Variant, name: str, layers: Sequence[Layer]) -> tuple[int, Any]:
    """Return the index of the last layer that gives an option, and its value there; or 0 and the default."""
    key = f"{section}.{name}"
    for index in reversed(range(len(layers))):
        if key in layers[index]:
            return index, layers[index][key].data
    return 0, dataclass_options(variant.config)[name].default


def _fitting(values: Mapping[str, Any], options: Mapping[str, Option]) -> dict[str, Any]:
    """Return the values of those sections that have all of the options given for them."""
    strangers = {key.partition(".")[0] for key in values if find(options, key) is None}
    return {key: data for key, data in values.items() if key.partition(".")[0] not in strangers}
