"""What all tests share: one torch thread, no network for models, and the example project on the path."""

import gc
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parent.parent
sys.path[:0] = [
    str(ROOT / place) for place in ("projects/example", "tests", "tests/checkpoints", "tests/engine", "tests/hub")
]

torch.set_num_threads(1)
settings.register_profile("villa", deadline=None, suppress_health_check=list(HealthCheck))  # a machine may be busy
settings.load_profile("villa")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded; read before the first test imports transformers


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--probes", type=Path, metavar="FILE", help="measure coverage: FILE.* of coverage.py")
    parser.addoption("--fuzz", type=int, metavar="N", help="examples a fuzz test (or VILLA_FUZZ_EXAMPLES; 50)")


#: Files that take long, or wait long: the first to begin, so that no process has one left at the end.
_LONG = (
    "launch/test_slurm_jobs.py",
    "launch/test_storms.py",
    "docs/test_docs.py",
    "models/test_huggingface_runs.py",
    "launch/test_slurm_sweeps.py",
    "launch/test_srun.py",
    "engine/test_training.py",
    "datasets/test_broken_databases.py",
    "checkpoints/test_damaged_checkpoints.py",
    "distributed/",
    "projects/",
    "planning/test_scale.py",
    "planning/test_memory_of_ranks.py",
    "studies/",
    "sweeps/",
    "tools/",
    "hub/",
    "engine/test_resume.py",
    "engine/test_signals.py",
    "config/test_fuzz.py",
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """Leave what is imported here, which stays to the end, to no garbage collection: it is most of all objects."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        path = item.path.relative_to(ROOT / "tests").as_posix()
        return next((place for place, name in enumerate(_LONG) if path.startswith(name)), len(_LONG))

    items.sort(key=rank)


_PROBES = pytest.StashKey[Any]()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--probes") is not None:  # before villa is imported
        from probes import Probes

        config.stash[_PROBES] = Probes(ROOT / "villa")
    if config.getoption("--fuzz") is not None:  # before the tests' modules read it
        os.environ["VILLA_FUZZ_EXAMPLES"] = str(config.getoption("--fuzz"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Save what the probes found; of several processes (``-n``), the main one does, with what the others send it."""
    if _PROBES not in session.config.stash:
        return
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["probes"] = session.config.stash[_PROBES].found()
    else:
        file: Path = session.config.getoption("--probes")
        session.config.stash[_PROBES].save(file.with_name(f"{file.name}.probes"))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if "probes" in getattr(node, "workeroutput", {}):
        node.config.stash[_PROBES].add(node.workeroutput["probes"])


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
