"""Strict parsing of JSON, so that nothing in it is dropped silently."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

#: Deepest nesting that is read: shallow enough for anything that recurses through values, such as ``repr``.
DEEPEST = 100
#: Largest size of a file read by ``read_own``, in bytes.
LARGEST = 1 << 28
#: A string, with the colon after it if it is a name; or a bracket.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"(\s*:)?|[{}\[\]]', re.DOTALL)
#: The escape of a surrogate, half of a character; two of them in a row make a whole one.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class RepeatedNameError(ValueError):
    """A name occurs twice in an object: JSON readers silently keep the last value."""


def parse_json(text: str) -> Any:
    """Parse JSON, more strictly than ``json.loads``.

    Raises:
        ValueError: it is not JSON, a name occurs twice in an object, brackets are nested more than ``DEEPEST`` deep,
            a number has thousands of digits, or a string holds a lone surrogate, which cannot be written to a file.
    """
    try:
        value, end = _PLAIN.raw_decode(text)
        # As many colons as names: none occurs twice. Without escapes no string holds a surrogate.
        flat = end == len(text) and type(value) is dict and len(value) == text.count(":")
        if flat and "\\u" not in text and text.count("[") < DEEPEST:
            return value
    except (ValueError, RecursionError):
        pass  # reported below
    try:
        value = _DECODER.decode(text)
        _check_depth(value, text)
        if _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RepeatedNameError as error:
        raise ValueError(f"{error}{_line_of_repetition(text)}") from None
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"\\u{ord(error.object[error.start]):04x} is half a character") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # a number that Python refuses to convert; the rest is advice for programmers
        raise ValueError(str(error).partition(";")[0]) from None
    return value


def parse_objects(lines: Sequence[str]) -> list[dict[str, Any]] | None:
    """Parse lines of one plain object each: twice as fast as ``parse_json`` does one by one.

    Returns:
        The objects; None if a line may hold anything else, or what ``parse_json`` refuses.
    """
    text = ",\n".join(lines)  # a string cannot go on in the next line
    # With a bracket at the beginning of every line and none elsewhere, there is an object a line, and none in another.
    count = len(lines)
    if not text.startswith("{") or not count == text.count("{") == text.count(",\n{") + 1:
        return None
    try:
        values = _PLAIN.decode(f"[{text}]")
    except (ValueError, RecursionError):
        return None
    if len(values) != count or {*map(type, values)} != {dict} or sum(map(len, values)) != text.count(":"):
        return None
    return None if "\\u" in text or text.count("[") >= DEEPEST else values


def unique_names(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object from its pairs; an ``object_pairs_hook`` for the ``json`` package.

    Raises:
        RepeatedNameError: a name occurs twice.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise RepeatedNameError(f"{name!r:.60} occurs twice in one object")
    return value


_PLAIN = json.JSONDecoder()
_DECODER = json.JSONDecoder(object_pairs_hook=unique_names)  # made once: making it takes as long as parsing a line


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a finite number within the range of a float."""
    largest = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest


def is_count(value: Any) -> TypeGuard[int]:
    """Return whether a JSON value is an integer in [0, 2^63)."""
    return type(value) is int and 0 <= value < 1 << 63


def read_own(path: Path) -> Any:
    """Read a JSON file that this package wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged: not a regular file of at most ``LARGEST`` bytes, not UTF-8, refused by
            ``parse_json``, or with a number that is not finite.
    """
    if path.stat().st_size > LARGEST or not path.is_file():  # before reading: a pipe would block
        raise ValueError(f"it is no file of at most {LARGEST} bytes")
    value = parse_json(path.read_bytes().decode())
    json.dumps(value, allow_nan=False)
    return value


def _check_depth(value: Any, text: str) -> None:
    if text.count("[") + text.count("{") <= DEEPEST:
        return
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise RecursionError
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [child for children in inner for child in children if isinstance(child, dict | list)]


def _line_of_repetition(text: str) -> str:
    """Return the words that give the line of a name's second occurrence, if the text has several lines."""
    if "\n" not in text.strip():
        return ""
    objects: list[set[str]] = []
    for token in _TOKEN.finditer(text):
        if token[0] in "{[":
            objects.append(set())
        elif token[0] in "}]":
            objects.pop()
        elif token[1]:
            name = json.loads(token[0].removesuffix(token[1]), strict=False)
            if name in objects[-1]:
                return f", again in line {text.count(chr(10), 0, token.start()) + 1}"
            objects[-1].add(name)
    return ""


def is_score(value: object) -> bool:
    """Say whether a value of JSON is a number in [0, 1]."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
