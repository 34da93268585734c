"""A value of a recipe and where it came from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Origin:
    """Where a value came from.

    Attributes:
        source: a YAML file, ``command line``, ``default`` or ``preset 'name'``.
        line: line of the file, from 1.
        stored: whether the file is the recipe inside a trained model, which may be anybody's: it names no code to run,
            and no address to fetch from.
    """

    source: str
    line: int | None = None
    stored: bool = False

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


DEFAULT = Origin("default")
COMMAND_LINE = Origin("command line")


@dataclass(frozen=True)
class Value:
    """A leaf of a recipe.

    Attributes:
        data: None, a bool, int, float, str, or a list of these (or of mappings).
        origin: where it stands.
        text: a scalar as it was written, which is what a string option gets: ``007`` stays ``007``.
    """

    data: Any
    origin: Origin
    text: str | None = None


#: The leaves of one file or of the command line, by dotted key, in order.
Layer = dict[str, Value]

#: Makes the origin of a line (counted from 1).
Locate = Callable[[int], Origin]

#: How YAML writes what is neither a number nor text.
WORDS = {None: "null", True: "true", False: "false"}

_SHOWN = 80
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def is_one_line(text: str) -> bool:
    """Whether a text has no line break, control character or half of a surrogate pair, as names and paths must."""
    return not _CONTROL.search(text)


def texts(data: object) -> Iterator[str]:
    """Yield the texts in a value: itself, or those in its lists and mappings."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, list | tuple | Mapping):
        for item in data.values() if isinstance(data, Mapping) else data:
            yield from texts(item)


def show(data: object) -> str:
    """Return a value as one short printable line, for messages."""
    text = WORDS[data] if isinstance(data, bool | None) else repr(data)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
