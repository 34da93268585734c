"""The options that dataclasses declare: types, defaults and documentation by dotted key."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from villa.config.schema import VARIANTS, RunConfig
from villa.errors import nearest

_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null"}


@dataclass(frozen=True)
class Option:
    """One option of a recipe.

    Attributes:
        hint: its type.
        default: its default; ``MISSING`` where it must be given.
        doc: its line in the ``Attributes:`` section of the dataclass that declares it.
    """

    hint: Any
    default: Any
    doc: str

    @property
    def entry(self) -> Any:
        """Type of the values of a mapping option; None for options without keys of their own."""
        for hint in alternatives(self.hint):
            if get_origin(hint) is dict:
                return get_args(hint)[1]
        return None


@cache
def fixed_options() -> dict[str, Option]:
    """Return the options that every recipe has, whatever classes its sections name, by dotted key."""
    return dataclass_options(RunConfig, skip=VARIANTS)


def recipe_options(variants: Mapping[str, type]) -> dict[str, Option]:
    """Return every option of a recipe by dotted key, given the ``Config`` of each variant section."""
    options = dataclass_options(RunConfig, skip=variants)
    for section, config in variants.items():
        options |= dataclass_options(config, f"{section}.")
    return options


def dataclass_options(cls: type, prefix: str = "", skip: Collection[str] = ()) -> dict[str, Option]:
    """Return the options of a dataclass and of the dataclasses in it by dotted key.

    Args:
        cls: the dataclass.
        prefix: put before every key.
        skip: fields to leave out.
    """
    found = _declared(cls).items()
    return {f"{prefix}{key}": option for key, option in found if key.partition(".")[0] not in skip}


@cache
def _declared(cls: type) -> dict[str, Option]:
    hints, docs = get_type_hints(cls), attribute_docs(cls)
    options: dict[str, Option] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            options |= dataclass_options(hint, f"{field.name}.")
        else:
            options[field.name] = Option(hint, _default(field), docs.get(field.name, ""))
    return options


def attribute_docs(cls: type) -> dict[str, str]:
    """Return the ``Attributes:`` entries of a class's docstring and of its bases', each as one line."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section.partition("\n\n")[0], re.MULTILINE)
        docs |= {name: " ".join(text.split()) for name, text in entries}
    return docs


def owner(options: Mapping[str, Option], key: str) -> str:
    """Return the option that a key is or lies in, or an empty string.

    The names of a mapping's entries may hold dots: ``optimizer.lr_multipliers.uniter.encoder``.
    """
    while key and key not in options:
        key = key.rpartition(".")[0]
    return key


def find(options: Mapping[str, Option], key: str) -> Option | None:
    """Return the option that ``key`` sets, or None; an entry of a mapping has the mapping's value type."""
    option = options.get(owner(options, key))
    if option is None or key in options:
        return option
    return None if option.entry is None else Option(option.entry, MISSING, "")


def why_unknown(options: Mapping[str, Option], key: str) -> str:
    """Say what is wrong with a key that no option has, with the nearest key and those of its section."""
    section, _, name = key.rpartition(".")
    if inner := [option for option in options if option.startswith(f"{key}.")]:
        return f"it is a section, not a value; give its keys: {_listed(inner)}"
    if single := owner(options, key):
        advice = "; quote it if it is text" if is_text(options[single].hint) else ""
        return f"'{single}' is {describe(options[single].hint)}, without keys of its own{advice}"
    inside = f"{section}." if section else ""
    beside = list(dict.fromkeys(_level(option, inside) for option in options if option.startswith(inside)))
    elsewhere = [option for option in options if option.rpartition(".")[2] == name]
    hint = nearest(key, beside) or (f"; did you mean '{elsewhere[0]}'?" if elsewhere else nearest(key, options))
    known = beside or list(dict.fromkeys(_level(option, "") for option in options))
    return f"unknown key{hint} (known: {_listed(known)})"


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_text(hint: Any) -> bool:
    """Whether a type takes text alone, or null."""
    return set(alternatives(hint)) <= {str, type(None)}


def literals(hint: Any) -> list[str]:
    """Return the strings that a ``Literal`` in a type allows."""
    members = [part for part in alternatives(hint) if get_origin(part) is Literal]
    return [name for part in members for name in get_args(part) if isinstance(name, str)]


def describe(hint: Any) -> str:
    """Say in words what a type takes: ``an integer or null``, ``one of 'a', 'b'``, ``a list of (a number)``."""
    parts, origin = get_args(hint), get_origin(hint)
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, parts))
    if origin is list or (origin is tuple and parts[-1] is Ellipsis):
        return f"a list of ({describe(parts[0])})"
    if origin is tuple:
        return f"a list of {len(parts)}: {', '.join(map(describe, parts))}"
    if origin is dict:
        return f"a mapping to ({describe(parts[1])})"
    return _NAMES.get(hint, "any value" if hint is Any else getattr(hint, "__name__", str(hint)))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING if field.default is dataclasses.MISSING else field.default


def _level(option: str, prefix: str) -> str:
    """Cut an option's key after the level below ``prefix``: a section, or an option of its own."""
    return prefix + option.removeprefix(prefix).partition(".")[0]


def _listed(keys: list[str]) -> str:
    return ", ".join(key.rpartition(".")[2] for key in keys)
