"""The options that dataclasses declare: types, defaults and documentation by dotted key."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from villa.config.schema import VARIANTS, RunConfig
from villa.config.values import Layer, Value, show
from villa.errors import ConfigError, nearest

_FRACTION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*/\s*(\d*[1-9]\d*)\s*")
_TEXTS, _HINT = str | list[str] | None, "hint"
#: Metadata of a field of type ``Any`` (for OmegaConf) that takes a text, as it is written, or a list of texts.
TEXTS = {_HINT: _TEXTS}
_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null"}


@dataclass(frozen=True)
class Option:
    """One option of a recipe.

    Attributes:
        hint: its type.
        default: its default; ``MISSING`` if it must be given.
        doc: its entry in the ``Attributes:`` section of the dataclass that declares it.
    """

    hint: Any
    default: Any
    doc: str

    @property
    def entry(self) -> Any:
        """Type of a mapping option's values; None for other options."""
        for hint in alternatives(self.hint):
            if get_origin(hint) is dict:
                return get_args(hint)[1]
        return None


@cache
def fixed_options() -> dict[str, Option]:
    """Return the options that do not depend on the classes that a recipe names, by dotted key."""
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
            hint = field.metadata.get(_HINT, hint)
            options[field.name] = Option(hint, _default(field), docs.get(field.name, ""))
    return options


def attribute_docs(cls: type) -> dict[str, str]:
    """Return the ``Attributes:`` entries in the docstrings of a class and its bases, each as one line."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section.partition("\n\n")[0], re.MULTILINE)
        docs |= {name: " ".join(text.split()) for name, text in entries}
    return docs


def owner(options: Mapping[str, Option], key: str) -> str:
    """Return the option that a key names or lies within, or an empty string.

    The names of a mapping's entries may hold dots: ``optimizer.lr_multipliers.uniter.encoder``.
    """
    while key and key not in options:
        key = key.rpartition(".")[0]
    return key


def find(options: Mapping[str, Option], key: str) -> Option | None:
    """Return the option that ``key`` sets, or None; an entry of a mapping gets the mapping's value type."""
    option = options.get(owner(options, key))
    if option is None or key in options:
        return option
    return None if option.entry is None else Option(option.entry, MISSING, "")


def why_unknown(options: Mapping[str, Option], key: str) -> str:
    """Explain what is wrong with an unknown key, with the nearest key and those of its section."""
    section, _, name = key.rpartition(".")
    if inner := [option for option in options if option.startswith(f"{key}.")]:
        return f"it is a section, not a value; give its keys: {_listed(inner)}"
    if single := owner(options, key):
        advice = "; quote it if it is text" if is_text(options[single].hint) else ""
        return f"'{single}' is {describe(options[single].hint)}, without keys of its own{advice}"
    inside = f"{section}." if section else ""
    beside = list(dict.fromkeys(_level(option, inside) for option in options if option.startswith(inside)))
    elsewhere = [option for option in options if option.rpartition(".")[2] == name]
    hint = nearest(key, beside) or nearest(key, elsewhere, least=0.0) or nearest(key, options)
    known = beside or list(dict.fromkeys(_level(option, "") for option in options))
    return f"unknown key{hint} (known: {_listed(known)})"


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def keeps_text(hint: Any, data: Any) -> bool:
    """Return whether an option of a type takes a value as the text that it is written as: ``007`` is not 7."""
    return is_text(hint) or (hint == _TEXTS and not isinstance(data, list))


def is_text(hint: Any) -> bool:
    """Return whether a type takes only text or null."""
    return set(alternatives(hint)) <= {str, type(None)}


def literals(hint: Any) -> list[str]:
    """Return the strings that a ``Literal`` in a type allows."""
    members = [part for part in alternatives(hint) if get_origin(part) is Literal]
    return [name for part in members for name in get_args(part) if isinstance(name, str)]


def describe(hint: Any) -> str:
    """Describe a type in words: ``an integer or null``, ``one of 'a', 'b'``, ``a list of (a number)``."""
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
    """Truncate an option's key after the level below ``prefix``: to a section, or an option."""
    return prefix + option.removeprefix(prefix).partition(".")[0]


def _listed(keys: list[str]) -> str:
    return ", ".join(key.rpartition(".")[2] for key in keys)


#: Sizes, counts and seeds are below this: signed 64-bit integers, as in torch and NumPy.
LARGEST = 2**63


def build(variants: Mapping[str, type], values: Layer) -> RunConfig:
    """Build a configuration from the dataclasses' defaults and the given values.

    Args:
        variants: the ``Config`` of each variant section.
        values: leaves by dotted key; a later one wins over an earlier one that it overlaps.

    Raises:
        ConfigError: unknown key, wrong type, missing option or broken interpolation.
    """
    options = recipe_options(variants)
    tree = copy.deepcopy(_defaults(tuple(variants.items())))
    for key, value in values.items():
        _assign(tree, options, key, value)
    # The command line first: of two values that fail together, the later one is more likely the culprit.
    for key, value in reversed(values.items()):
        _interpolate(tree, options, key, value)
    _require(tree, options)
    config = OmegaConf.to_object(tree)
    assert isinstance(config, RunConfig)
    return config


@lru_cache(maxsize=16)
def _defaults(variants: tuple[tuple[str, type], ...]) -> Any:
    """Build the tree of all defaults, kept because it takes most of the time that a configuration takes."""
    tree = OmegaConf.structured(RunConfig)
    for section, cls in variants:
        tree[section] = OmegaConf.structured(cls)
    return tree


def build_options(cls: type, values: Layer, whose: str) -> Any:
    """Build one dataclass of options from its defaults and the given values.

    Args:
        cls: the dataclass.
        values: leaves by name.
        whose: whose options they are, for messages: ``"extractor 'bottom_up'"``.

    Raises:
        ConfigError: unknown name, wrong type or missing option.
    """
    options, tree = dataclass_options(cls), OmegaConf.structured(cls)
    for key, value in values.items():
        if key not in options:
            raise ConfigError(f"{whose} has no option '{key}'{nearest(key, options)} (known: {_listed([*options])})")
        _assign(tree, options, key, value)
    missing = sorted(OmegaConf.missing_keys(tree))
    if missing:
        what, doc = describe(options[missing[0]].hint), options[missing[0]].doc.replace("``", "'").rstrip(".")
        raise ConfigError(f"{whose} needs {missing[0]}, {what}: {doc}; give {missing[0]}=VALUE")
    return OmegaConf.to_object(tree)


def _assign(tree: DictConfig, options: Mapping[str, Option], key: str, value: Value) -> None:
    option = find(options, key)
    if option is None:
        raise ConfigError(f"{key} ({value.origin}): {why_unknown(options, key)}")
    given = f"{key} = {show(value.data)} ({value.origin})"
    try:
        if _needs_quotes(option.hint, value.data):
            raise ValidationError(key)
        if _is_too_large(option.hint, value.data):
            raise ConfigError(f"{given}: must be {describe(option.hint)}, of a size below 2^63")
        _set(tree, options, key, _as_written(option.hint, value))
    except (OmegaConfBaseException, OverflowError) as error:
        if "${" in str(value.data):
            raise ConfigError(f"{given}: {_first_line(error)}; write \\${{ for a literal ${{") from None
        hint = nearest(str(value.data), literals(option.hint))
        if value.data is None and value.text and is_text(option.hint):
            hint = f"; write it in quotes of YAML for the text '{value.text}'"
        raise ConfigError(f"{given}: must be {describe(option.hint)}{hint}") from None
    except RecursionError:
        raise ConfigError(f"{given}: ${{...}} is nested too deeply") from None


def _set(tree: DictConfig, options: Mapping[str, Option], key: str, data: Any) -> None:
    mapping = owner(options, key)
    if mapping != key:
        # The whole mapping is assigned: merging one entry into it would skip the check of its type.
        entries = OmegaConf.select(tree, mapping)
        before: Any = {} if entries is None else OmegaConf.to_container(entries)
        data = {**before, key.removeprefix(f"{mapping}."): data}
    OmegaConf.update(tree, mapping, data, merge=False)


def _as_written(hint: Any, value: Value) -> Any:
    """Return the text of the recipe for an option that takes only strings (``007`` is not 7), else the value."""
    if keeps_text(hint, value.data) and value.text is not None and value.data is not None:
        return value.text
    return _as_numbers(hint, value.data)


def _as_numbers(hint: Any, data: Any) -> Any:
    """Return what a number option was given, with fractions (``4/255``) as numbers."""
    parts = alternatives(hint)
    if isinstance(data, list):
        inner = next((get_args(part)[0] for part in parts if get_origin(part) is list), None)
        return data if inner is None else [_as_numbers(inner, item) for item in data]
    found = _FRACTION.fullmatch(data) if float in parts and str not in parts and isinstance(data, str) else None
    return data if found is None else float(found[1]) / float(found[2])


def _needs_quotes(hint: Any, data: Any) -> bool:
    """Return whether a list of strings holds anything else, whose text is lost (``[1e3, true]``)."""
    of_text = any(get_origin(part) in (list, tuple) and get_args(part)[0] is str for part in alternatives(hint))
    return of_text and isinstance(data, list) and not all(isinstance(item, str) for item in data)


def _is_too_large(hint: Any, data: Any) -> bool:
    """Return whether an integer, or one in a list, does not fit in 64 bits."""
    if isinstance(data, list) and any(get_origin(part) in (list, tuple) for part in alternatives(hint)):
        inner = [get_args(part)[0] for part in alternatives(hint) if get_origin(part) in (list, tuple)]
        return any(_is_too_large(part, item) for part in inner for item in data)
    return int in alternatives(hint) and isinstance(data, int) and abs(data) >= LARGEST


def _require(tree: DictConfig, options: Mapping[str, Option]) -> None:
    missing = sorted(OmegaConf.missing_keys(tree))
    if missing:
        option = find(options, missing[0])
        wanted = describe(option.hint) if option else "a value"
        raise ConfigError(
            f"{missing[0]}: missing; it must be {wanted}: give {missing[0]}=VALUE or set it in the recipe"
        )


def _interpolate(tree: DictConfig, options: Mapping[str, Option], key: str, value: Value) -> None:
    if "${" not in str(value.data):
        return
    option = owner(options, key)
    try:
        found = OmegaConf.select(tree, option)
        if OmegaConf.is_config(found):
            OmegaConf.to_container(found, resolve=True)
        elif not keeps_text(options[option].hint, found) and any(
            get_origin(part) in (list, tuple, dict) for part in alternatives(options[option].hint)
        ):
            # OmegaConf accepts an escaped interpolation for a list until it is converted.
            raise ValidationError(f"must be {describe(options[option].hint)}")
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{key} = {show(value.data)} ({value.origin}): {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return f"{(str(error).splitlines() or [type(error).__name__])[0]:.200}"
