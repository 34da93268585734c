"""Overlays: options of a registered class that change the rest of a recipe (``dataset.synthetic`` shrinks it)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from villa.config.options import Option, dataclass_options, find, recipe_options
from villa.config.values import Layer, Origin, Value, show

if TYPE_CHECKING:
    from villa.config.variants import Variant


@dataclass(frozen=True)
class Overlay:
    """Values of any section that an option brings along; a ``Config`` lists them in its ``OVERLAYS``.

    Attributes:
        when: the section's options, by name, that must have these values; the first one turns the overlay on.
        values: values by dotted key; those of a section whose class does not know all of them are left out, for they
            belong together (a width and the number of heads).
    """

    when: Mapping[str, Any]
    values: Mapping[str, Any]


def lay_over(layers: Sequence[Layer], variants: Mapping[str, Variant]) -> list[Layer]:
    """Return the layers with the overlays that are on, each directly below the layer that turns it on.

    So ``dataset.synthetic=true`` on the command line wins over all files and loses to the other arguments, and a file
    that says ``synthetic: true`` (a saved recipe does) keeps its own values.
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
    return [below.get(index, {}) | layer for index, layer in enumerate(layers)]


def _find(section: str, variant: Variant, name: str, layers: Sequence[Layer]) -> tuple[int, Any]:
    """Return the number of the last layer that gives an option, and its value there; or 0 and the default."""
    key = f"{section}.{name}"
    for index in reversed(range(len(layers))):
        if key in layers[index]:
            return index, layers[index][key].data
    return 0, dataclass_options(variant.config)[name].default


def _fitting(values: Mapping[str, Any], options: Mapping[str, Option]) -> dict[str, Any]:
    """Return the values of the sections that know all of theirs."""
    strangers = {key.partition(".")[0] for key in values if find(options, key) is None}
    return {key: data for key, data in values.items() if key.partition(".")[0] not in strangers}
