"""Command line arguments ``key=value`` to a layer of values."""

from __future__ import annotations

import re
from collections.abc import Iterable

from villa.config.values import COMMAND_LINE, Layer, is_one_line
from villa.config.yaml_text import parse
from villa.errors import ConfigError

_KEY = re.compile(r"[\w/-]+(\.[\w/*-]+)*")


def parse_overrides(args: Iterable[str]) -> tuple[str | None, Layer]:
    """Parse ``config=recipe.yaml a.b=c list.key=[1,2] trainer=freelb``; the last of equal keys wins.

    Values are YAML: ``x=1e-3`` is a number, ``x=`` is null, ``x='1'`` is text. In a shell, quote brackets and
    blanks.

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
            layer |= _values(key, text)
    if config is not None and not (config and is_one_line(config)):
        raise ConfigError(f"config={config!r:.80} (command line): give the path of a YAML file")
    return config, layer


def _values(key: str, text: str) -> Layer:
    try:
        return parse(text, lambda _: COMMAND_LINE, prefix=key)
    except ConfigError as error:
        raise ConfigError(f"{key} = {text!r:.80} ({error})") from None
