import math
import sys
from typing import Any

import pytest

from villa.json_values import is_number


@pytest.mark.parametrize("value", [0, -3, 2.5, sys.float_info.max, -sys.float_info.max])
def test_numbers(value: Any) -> None:
    assert is_number(value)


@pytest.mark.parametrize("value", [True, "1", None, [1], math.nan, math.inf, -math.inf, 10**400])
def test_what_is_no_number(value: Any) -> None:
    assert not is_number(value)
