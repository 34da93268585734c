"""One SLURM for all tests that need it."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from cluster import running_cluster


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """The environment of a real SLURM's commands; only root can start one."""
    if os.getuid() != 0:
        pytest.skip("only root can install and start SLURM")
    base: Path = tmp_path_factory.mktemp("slurm")
    for folder in (base, *base.parents[:2]):  # its daemons look for their files as other users
        folder.chmod(0o755)
    with running_cluster(base) as environment:
        yield environment
