"""The values of recipes and their origins."""

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
        stored: whether the file is the recipe inside a trained model, which is not trusted to name code to run or
            URLs to download.
    """

    source: str
    line: int | None = None
    stored: bool = False

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


DEFAULT = Origin("default")
COMMAND_LINE = Origin("command line")


@dataclass(frozen=True)
class Written:
    """The text after the equals sign of a command line argument, for options that take text.

    Attributes:
        text: the text, stripped.
        below: if the text is a mapping, the rest of the value's key within it; else empty.
        problem: why the text is not YAML, if it is not.
    """

    text: str
    below: str = ""
    problem: str | None = None


@dataclass(frozen=True)
class Value:
    """A leaf of a recipe.

    Attributes:
        data: None, a bool, int, float, str, or a list of these (or of mappings).
        origin: where it was given.
        text: a scalar as written, which a string option gets: ``007`` stays ``007``.
        written: the command line argument that it is (part of), if a string option would get something else.
    """

    data: Any
    origin: Origin
    text: str | None = None
    written: Written | None = None


#: The leaves of one file or of the command line by dotted key, in order.
Layer = dict[str, Value]

#: Returns the origin of a line (counted from 1).
Locate = Callable[[int], Origin]

#: YAML's words for null and booleans.
WORDS = {None: "null", True: "true", False: "false"}

_LONGEST_SHOWN = 80
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def is_one_line(text: str) -> bool:
    """Return whether a text has no line break, control character or lone surrogate, as names and paths must not."""
    return not _CONTROL.search(text)


def texts(data: object) -> Iterator[str]:
    """Yield all strings in a value, its lists and its mappings."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, list | tuple | Mapping):
        for item in data.values() if isinstance(data, Mapping) else data:
            yield from texts(item)


def show(data: object) -> str:
    """Return a value as one short printable line, for messages."""
    text = WORDS[data] if isinstance(data, bool | None) else repr(data)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."
