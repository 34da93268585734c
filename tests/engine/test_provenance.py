from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from villa.engine.provenance import provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init")
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_revision_and_dirty_flag(repository: Path) -> None:
    revision = git(repository, "rev-parse", "HEAD")
    assert provenance(repository)["git"] == {"revision": revision, "dirty": False}
    (repository / "code.py").write_text("2\n")
    assert provenance(repository)["git"] == {"revision": revision, "dirty": True}


def test_a_subfolder_has_the_revision_of_its_repository(repository: Path) -> None:
    (repository / "sub").mkdir()
    assert provenance(repository / "sub") == provenance(repository)


def test_output_of_the_run_does_not_make_it_dirty(repository: Path) -> None:
    before = provenance(repository)
    (repository / "outputs").mkdir()
    (repository / "outputs" / "log.txt").write_text("x")
    assert provenance(repository) == before


def test_a_program_named_by_the_repository_is_not_run(repository: Path) -> None:
    hook = repository / "hook.sh"
    hook.write_text(f"#!/bin/sh\ntouch {repository / 'ran'}\n")
    hook.chmod(0o755)
    git(repository, "config", "core.fsmonitor", str(hook))
    provenance(repository)
    assert not (repository / "ran").exists()


def test_working_directory_is_the_default(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    assert provenance() == provenance(repository)


@pytest.mark.parametrize("initialised", [False, True])
def test_no_repository_or_no_commit_is_no_error(tmp_path: Path, initialised: bool) -> None:
    if initialised:
        git(tmp_path, "init")
    assert provenance(tmp_path)["git"] is None


def test_no_git_is_no_error(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert provenance(repository)["git"] is None


def test_versions_are_recorded_and_no_path_is(repository: Path) -> None:
    value = provenance(repository)
    assert value["packages"]["torch"] == torch.__version__
    assert "/" not in json.dumps(value)
