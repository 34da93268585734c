"""The axes of a sweep, and its points: all combinations of their values."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from villa.errors import ConfigError

#: The axis over which tables take means.
SEED = "seed"

_UNSAFE = re.compile(r"[^\w.=+-]+")
_LONGEST_NAME = 120
_QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*\"""")
_BRACKETS = {"[": "]", "{": "}"}


@dataclass(frozen=True)
class Axis:
    """One varied option, or several that vary together.

    Attributes:
        name: name of the option, or a word for several options; the heading of its column.
        values: the overrides of each value, by the value's name.
    """

    name: str
    values: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        values: value of each axis.
        overrides: the overrides for these values.
    """

    values: Mapping[str, str]
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the run's folder: ``lr=1e-5,seed=2``, with a checksum if characters had to be replaced."""
        full = ",".join(f"{axis.rpartition('.')[2]}={value}" for axis, value in self.values.items())
        safe = ",".join(_UNSAFE.sub("_", part) for part in full.split(","))[:_LONGEST_NAME]
        exact = ",".join(f"{axis}={value}" for axis, value in self.values.items())
        return safe if safe == full else f"{safe}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"

    def group(self) -> tuple[tuple[str, str], ...]:
        """Return the values of all axes but the seed."""
        return tuple((axis, value) for axis, value in self.values.items() if axis != SEED)


def parse_axis(argument: str) -> Axis:
    """Parse ``optimizer.lr=1e-5,3e-5``: values separated by commas outside brackets and quotes.

    A quote within a value is an apostrophe, and a bracket that is never closed is text.

    Raises:
        ConfigError: it is not of that form, or a value is given twice.
    """
    name, equals, text = argument.partition("=")
    values = _split(text)
    if not (equals and name and all(values)):
        raise ConfigError(f"--sweep {argument!r:.80} is not of the form option=value,value,...")
    if name == "output_dir":
        raise ConfigError(f"--sweep {argument!r:.80}: it is the folder of the whole sweep; give it before --sweep")
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ConfigError(f"--sweep {name} has {twice} twice; give every value once")
    return Axis(name, {value: (f"{name}={value}",) for value in values})


def points(axes: Sequence[Axis]) -> list[Point]:
    """Return every combination of the axes' values, the last axis varying fastest.

    Raises:
        ConfigError: there is no axis, two have the same name, or two runs would have the same folder.
    """
    names = [axis.name for axis in axes]
    if not names:
        raise ConfigError("a sweep needs an option to vary: --sweep option=value,value,...")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--sweep gives {twice} twice; list all of its values in one")
    found = [
        Point(
            dict(zip(names, (value for value, _ in chosen), strict=True)),
            tuple(itertools.chain.from_iterable(overrides for _, overrides in chosen)),
        )
        for chosen in itertools.product(*(axis.values.items() for axis in axes))
    ]
    refuse_shared_folders(found)  # names omit sections: a.size and b.size differ by order only
    return found


def refuse_shared_folders(found: Sequence[Point]) -> None:
    """Refuse points whose runs would have one folder.

    Raises:
        ConfigError: there are such points.
    """
    if len({point.name for point in found}) < len(found):
        raise ConfigError("two runs of the sweep would write to one folder; give its options or values other names")


def _split(text: str) -> list[str]:
    """Split at the commas outside quotes and closed brackets."""
    opened, closed, commas = list[int](), set[int | None](), list[tuple[int, int | None]]()
    at, before = 0, ","
    while at < len(text):
        character = text[at]
        quoted = _QUOTED.match(text, at) if before in ",[{:" else None  # elsewhere it is an apostrophe
        if character == ",":
            commas.append((at, opened[-1] if opened else None))
        elif character in _BRACKETS:
            opened.append(at)
        elif opened and character == _BRACKETS[text[opened[-1]]]:
            closed.add(opened.pop())
        before = before if character == " " else character
        at = quoted.end() if quoted else at + 1
    ends = [end for end, inside in commas if inside not in closed]
    return [text[start:end].strip() for start, end in zip((0, *(end + 1 for end in ends)), (*ends, None), strict=True)]
