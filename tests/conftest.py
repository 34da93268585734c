"""What all tests share: one torch thread, no network for models, and the example project on the path."""

import os
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "projects" / "example"), str(Path(__file__).parent), str(Path(__file__).parent / "engine")]

torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded; read before the first test imports transformers


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, metavar="N", help="examples a fuzz test (or VILLA_FUZZ_EXAMPLES; 50)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fuzz") is not None:  # before the tests' modules read it
        os.environ["VILLA_FUZZ_EXAMPLES"] = str(config.getoption("--fuzz"))


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def official_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small databases in the released formats: ``txt_db/<name>.db`` and ``img_db/<name>``; read only."""
    folder = tmp_path_factory.mktemp("official_db")
    with tarfile.open(ROOT / "tests" / "golden" / "official_db" / "databases.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder
