"""Values of JSON files that others wrote."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, TypeGuard

#: How deep the containers of our own files may lie in each other, and how large a file of theirs may be.
DEEPEST, LARGEST = 64, 1 << 28


def is_number(value: Any) -> bool:
    """Say whether a value of JSON is a number that a float can hold; NaN and infinities are none."""
    largest = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest


def is_count(value: Any) -> TypeGuard[int]:
    """Say whether a value of JSON is a whole number from 0 on, of 63 bits."""
    return type(value) is int and 0 <= value < 1 << 63


def read_own(path: Path) -> Any:
    """Read a JSON file that this package wrote; what it never writes is damage.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON in UTF-8, names a key twice, is nested deeply, or has a number that is not finite or a
            text that UTF-8 has not.
    """
    if not path.is_file() or path.stat().st_size > LARGEST:  # before it is waited for, or in memory
        raise ValueError(f"it is no file of at most {LARGEST} bytes")
    try:
        value = json.loads(
            path.read_bytes().decode(), object_pairs_hook=_distinct, parse_float=_finite, parse_constant=_finite
        )
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    _check_depth(value)
    json.dumps(value, ensure_ascii=False).encode()  # half a pair of surrogates, as "\\ud800", is refused here
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError("its values are nested too deeply")
