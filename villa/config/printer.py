"""Print configurations as YAML that can be loaded again, with or without the origin of every value."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from villa.config.schema import VARIANTS, RunConfig
from villa.config.values import Origin
from villa.config.yaml_text import write

_INDENT = "  "


def leaves(config: RunConfig) -> dict[str, Any]:
    """Return every value by dotted key."""
    return dict(_walk(dataclasses.asdict(config), ""))


def to_yaml(config: RunConfig) -> str:
    """Return a configuration as fully resolved YAML; ``from_yaml`` loads an equal one.

    Sections of one made in code that name no variant are left out, so that their defaults apply.
    """
    tree = dataclasses.asdict(config)
    given = {name: value for name, value in tree.items() if value is not None or name not in VARIANTS}
    return "\n".join(_lines(given, lambda key: "")) + "\n"


def annotated(config: RunConfig, origins: Mapping[str, Origin], notices: Sequence[str] = ()) -> str:
    """Return a configuration as YAML with the origin of every value in a comment."""
    lines = list(_lines(dataclasses.asdict(config), lambda key: f"   # {origins[key]}"))
    return "\n".join([*(f"# {notice}" for notice in notices), *lines]) + "\n"


def _walk(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _walk(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _lines(tree: Mapping[str, Any], comment: Callable[[str], str], prefix: str = "") -> Iterator[str]:
    indent = _INDENT * prefix.count(".")
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield f"{indent}{write(name)}:"
            yield from _lines(value, comment, f"{key}.")
        else:
            yield f"{indent}{write(name)}: {write(_escape(value))}{comment(key)}"


def _escape(value: Any) -> Any:
    """Escape a literal ``${`` (and backslashes before it) so that it is not read as an interpolation."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)
    if isinstance(value, list | tuple):
        return [_escape(item) for item in value]
    return value
