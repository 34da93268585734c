"""Command line arguments ``key=value`` to a layer of values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from villa.config.options import Option, alternatives, find, fixed_options, is_text
from villa.config.values import COMMAND_LINE, Layer, Value, Written, is_one_line
from villa.config.yaml_text import is_null, parse
from villa.errors import ConfigError

_KEY = re.compile(r"[\w/-]+(\.[\w/*-]+)*")


def parse_overrides(args: Iterable[str]) -> tuple[str | None, Layer]:
    """Parse ``config=recipe.yaml a.b=c list.key=[1,2] trainer=freelb``; the last of equal keys wins.

    Values are YAML: ``x=1e-3`` is a number, ``x=`` is null, ``x='1'`` is text. An option that takes text gets what is
    neither null nor a quoted text as it is written; see ``take_text``. In a shell, quote brackets and blanks.

    Returns:
        The recipe's path, or None, and the other values.

    Raises:
        ConfigError: an argument is not ``key=value``, or its value is not YAML.
    """
    config: str | None = None
    layer: Layer = {}
    for argument in args:
        key, equals, text = argument.partition("=")
        if not equals:
            hint = f"; did you mean 'config={argument}'?" if argument.endswith((".yaml", ".yml")) else ""
            raise ConfigError(f"the argument {argument!r:.80} is not of the form key=value{hint}")
        if not _KEY.fullmatch(key):
            raise ConfigError(f"{key!r:.80} (command line) is not a key; write section.option=value")
        if key == "config":
            config = text
        else:
            _add(_values(key, text), layer)
    if config is not None and not (config and is_one_line(config)):
        raise ConfigError(f"config={config!r:.80} (command line): give the path of a YAML file")
    return config, take_text(layer, fixed_options())


def take_text(layer: Layer, options: Mapping[str, Option]) -> Layer:
    """Return the layer with the arguments of options that take text as they were written: ``prompt={question} A.``.

    Args:
        layer: what is in it for options that are not known here stays as it is.
        options: by dotted key.

    Raises:
        ConfigError: the value of another option is not YAML.
    """
    taken: Layer = {}
    for key, value in layer.items():
        if (written := value.written) is None:
            _add({key: value}, taken)
            continue
        own = key.removesuffix(f".{written.below}") if written.below else key
        option = find(options, own)
        if option is not None and (is_text(option.hint) or (written.problem and str in alternatives(option.hint))):
            _add({own: Value(written.text, value.origin, written.text)}, taken)
        elif option is not None and written.problem:
            raise ConfigError(written.problem)
        elif value.data != {} or not any(known.startswith(f"{own}.") for known in options):  # else nothing of a section
            _add({key: value}, taken)
    return taken


def _add(values: Layer, layer: Layer) -> None:
    """Put values at the end of a layer, where they win over what they overlap."""
    for key, value in values.items():
        layer.pop(key, None)
        layer[key] = value


def _values(key: str, text: str) -> Layer:
    try:
        layer, problem = parse(text, lambda _: COMMAND_LINE, prefix=key), None
    except ConfigError as error:
        layer, problem = {}, f"{key} = {text!r:.80} ({error})"
    plain = text.strip()
    if not is_one_line(plain):
        if problem:
            raise ConfigError(problem)
        return layer
    quoted = plain[:1] in ("'", '"') and key in layer and layer[key].text is not None
    if is_null(plain) or quoted:
        return layer
    if not layer and (problem or "." in key or key in fixed_options()):  # an empty mapping of a section sets nothing
        return {key: Value(plain if problem else {}, COMMAND_LINE, plain, Written(plain, problem=problem))}
    return {name: replace(value, written=Written(plain, name[len(key) + 1 :])) for name, value in layer.items()}
