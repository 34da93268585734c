from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

WriteLines = Callable[[str, list[Any]], str]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Six images of noise."""
    random = np.random.default_rng(0)
    paths = [tmp_path / f"image{number}.png" for number in range(6)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def write_lines(tmp_path: Path) -> WriteLines:
    """Write records (or raw lines) to a JSON-lines file in ``tmp_path``; return its path."""

    def write(name: str, records: list[Any]) -> str:
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return str(tmp_path / name)

    return write
