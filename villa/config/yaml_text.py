"""Parse YAML text into values with their lines, and write values as YAML.

Plain scalars follow the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema): ``1e-3`` is a
number, ``yes`` and ``on`` are strings. Aliases, custom tags and several documents are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from villa.config.values import WORDS, Layer, Locate, Value, is_one_line
from villa.errors import ConfigError

#: Levels of keys: section, option, entry of a mapping option.
LEVELS = 3
#: Most levels of mappings and lists together.
_NESTING = 6
#: Most digits of an integer; Python refuses to print one of more than 4300.
_DIGITS = 1000
_KEY = re.compile(r"[\w/-]+")
#: Keys of the last level may be dotted names, for example of a model's modules.
_ENTRY_KEY = re.compile(r"[\w./*-]+")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_PLAIN = re.compile(r"[A-Za-z_./][\w./+-]*", re.ASCII)
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map")}


def parse(text: str, locate: Locate, prefix: str = "") -> Layer:
    """Return the leaves of a YAML document by dotted key.

    Args:
        text: one document.
        locate: returns the origin of a line.
        prefix: key of which the document is the value; without one, the document must be a mapping.

    Raises:
        ConfigError: the YAML cannot be used; the message names the line.
    """
    node = _compose(text, locate)
    if node is None and not prefix:
        return {}
    if node is None:
        return {prefix: Value(None, locate(1), "")}
    if not prefix and not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{_where(node, locate)}: a recipe is a mapping of 'key: value' lines")
    path = tuple(prefix.split(".", LEVELS - 1)) if prefix else ()
    return dict(_leaves(node, path, locate))


def resolve(text: str) -> Any:
    """Return the value of a plain scalar: None, a bool, int, float or the text itself.

    Raises:
        ValueError: an integer has too many digits.
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        if len(text) > _DIGITS:
            raise ValueError(text)
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)
    if _INFINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return float(text) if _FLOAT.fullmatch(text) else text


def is_null(text: str) -> bool:
    """Return whether a plain scalar means null."""
    return text in _WORDS and _WORDS[text] is None


def write(data: Any) -> str:
    """Return a value as one line of YAML that ``parse`` reads back as the same value."""
    if isinstance(data, list | tuple):
        return f"[{', '.join(map(write, data))}]"
    if isinstance(data, dict):
        return f"{{{', '.join(f'{write(key)}: {write(value)}' for key, value in data.items())}}}"
    return _write_text(str(data)) if isinstance(data, str) else _write_word(data)


def _write_word(data: bool | float | None) -> str:
    if isinstance(data, bool | None):
        return WORDS[data]
    return (
        repr(data)
        if isinstance(data, int) or math.isfinite(data)
        else repr(data).replace("inf", ".inf").replace("nan", ".nan")
    )


def _write_text(text: str) -> str:
    if _PLAIN.fullmatch(text) and isinstance(resolve(text), str):
        return text
    quoted: str = yaml.safe_dump(text, default_style='"', allow_unicode=True, width=math.inf)
    return quoted.removesuffix("\n")


def _compose(text: str, locate: Locate) -> Any:
    try:
        _refuse_bombs(text, locate)
        # The base loader leaves every plain scalar a string, for ``resolve``.
        return yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = " ".join((error.problem or error.context or "cannot be parsed").split())
        raise ConfigError(f"{locate(line)}: not valid YAML: {problem}; quote the text if it is a string") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{locate(line)}: not valid YAML: character {error.character:#x} is not allowed") from None
    except (ValueError, OverflowError):
        raise ConfigError(f"{locate(1)}: not valid YAML: a number or an escape is out of range") from None


def _refuse_bombs(text: str, locate: Locate) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(
                f"{_where(event, locate)}: aliases (*{event.anchor}) are not supported; use ${{key}} or includes, "
                "or quote the text"
            )
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _NESTING:
            raise ConfigError(f"{_where(event, locate)}: nested too deeply")


def _leaves(node: Any, path: tuple[str, ...], locate: Locate) -> Iterator[tuple[str, Value]]:
    key = ".".join(path)
    if not isinstance(node, yaml.MappingNode) or len(path) >= LEVELS:  # below, a mapping is a value
        text = node.value if isinstance(node, yaml.ScalarNode) else None
        yield key, Value(_construct(node, locate), locate(node.start_mark.line + 1), text)
        return
    pattern = _ENTRY_KEY if len(path) + 1 == LEVELS else _KEY
    for name, child in _items(node, locate, pattern):
        yield from _leaves(child, (*path, name), locate)


def _items(node: Any, locate: Locate, pattern: re.Pattern[str]) -> Iterator[tuple[str, Any]]:
    _check_tag(node, locate)
    seen: dict[str, int] = {}
    for key, child in node.value:
        line = key.start_mark.line + 1
        name = _construct(key, locate)
        if not isinstance(name, str) or not pattern.fullmatch(name):
            hint = ""
            if isinstance(name, str) and "." in name:
                hint = "; write 'a: {b: c}' for 'a.b: c'"
            elif isinstance(name, str) and ":" in name:
                hint = "; write a space after ':'"
            raise ConfigError(
                f"{locate(line)}: the key {name!r:.80} is not a name of letters, digits, _, - and /{hint}"
            )
        if name in seen:
            raise ConfigError(f"{locate(line)}: the key '{name}' is given twice, first in line {seen[name]}; keep one")
        seen[name] = line
        yield name, child


def _construct(node: Any, locate: Locate) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {name: _construct(child, locate) for name, child in _items(node, locate, _ENTRY_KEY)}
    _check_tag(node, locate)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(child, locate) for child in node.value]
    text: str = node.value
    if not is_one_line(text):
        raise ConfigError(f"{_where(node, locate)}: the text holds a line break or a control character; remove it")
    try:
        return resolve(text) if node.style is None else text
    except ValueError:
        raise ConfigError(f"{_where(node, locate)}: the number has too many digits") from None


def _check_tag(node: Any, locate: Locate) -> None:
    if node.tag not in _TAGS:
        raise ConfigError(f"{_where(node, locate)}: the tag {node.tag!r:.80} is not supported; remove it")


def _where(thing: Any, locate: Locate) -> str:
    return str(locate(thing.start_mark.line + 1))
