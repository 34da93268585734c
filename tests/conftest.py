"""What all tests share: one torch thread, and the example project on the path."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "projects" / "example"), str(Path(__file__).parent), str(Path(__file__).parent / "engine")]

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT
