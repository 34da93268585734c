"""A place to run recipes in."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the module's own, so that data are generated once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def elsewhere(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work where there are no data sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VILLA_CACHE", str(cache))
