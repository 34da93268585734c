"""Values to a typed configuration: OmegaConf converts and checks, every error names its key and origin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from villa.config.options import (
    Option,
    alternatives,
    describe,
    find,
    is_text,
    literals,
    owner,
    recipe_options,
    why_unknown,
)
from villa.config.schema import RunConfig
from villa.config.values import Layer, Value, show
from villa.errors import ConfigError, nearest

#: Sizes, counts and seeds are below this: 64 bits with a sign, as torch and numpy take them.
LARGEST = 2**63


def build(variants: Mapping[str, type], values: Layer) -> RunConfig:
    """Return the configuration that the values make of the dataclasses' defaults.

    Args:
        variants: the ``Config`` of each variant section.
        values: leaves by dotted key; a later one wins over an earlier one that it overlaps.

    Raises:
        ConfigError: unknown key, wrong type, missing option or broken interpolation.
    """
    options = recipe_options(variants)
    tree = OmegaConf.structured(RunConfig)
    for section, cls in variants.items():
        tree[section] = OmegaConf.structured(cls)
    for key, value in values.items():
        _assign(tree, options, key, value)
    # The command line first: of two values that fail together, the later one is more likely the culprit.
    for key, value in reversed(values.items()):
        _interpolate(tree, options, key, value)
    _require(tree, options)
    config = OmegaConf.to_object(tree)
    assert isinstance(config, RunConfig)
    return config


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
    """Give an option that takes only strings the text as it stands in the recipe: ``007`` is not 7."""
    return value.text if is_text(hint) and value.text is not None and value.data is not None else value.data


def _needs_quotes(hint: Any, data: Any) -> bool:
    """Whether a list of strings holds something else, whose text is lost (``[1e3, true]``)."""
    of_text = any(get_origin(part) in (list, tuple) and get_args(part)[0] is str for part in alternatives(hint))
    return of_text and isinstance(data, list) and not all(isinstance(item, str) for item in data)


def _is_too_large(hint: Any, data: Any) -> bool:
    """Whether a whole number, or one in a list, is one that no computation here takes."""
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
        elif any(get_origin(part) in (list, tuple, dict) for part in alternatives(options[option].hint)):
            # OmegaConf lets an escaped interpolation stand for a list until it is converted.
            raise ValidationError(f"must be {describe(options[option].hint)}")
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{key} = {show(value.data)} ({value.origin}): {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return f"{(str(error).splitlines() or [type(error).__name__])[0]:.200}"
