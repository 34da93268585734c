"""Values of JSON files that others wrote."""

from __future__ import annotations

import sys
from typing import Any


def is_number(value: Any) -> bool:
    """Say whether a value of JSON is a number that a float can hold; NaN and infinities are none."""
    largest = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest
