"""What the tests of raw annotations share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

WriteJson = Callable[[str, Any], Path]
