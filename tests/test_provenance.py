from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from villa.provenance import check_provenance, provenance


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


@pytest.fixture
def canary(repository: Path) -> Path:
    """A program that leaves the file ``ran`` behind, and a tracked file that looks changed."""
    program = repository / "program.sh"
    program.write_text(f"#!/bin/sh\ntouch {repository / 'ran'}\ncat\n")
    program.chmod(0o755)
    (repository / ".gitattributes").write_text("* filter=evil diff=evil\n")
    os.utime(repository / "code.py", (1, 1))
    return program


@pytest.mark.parametrize(
    "settings",
    [
        {"core.fsmonitor": "PROGRAM"},
        {"filter.evil.clean": "PROGRAM", "filter.evil.smudge": "PROGRAM"},
        {"filter.evil.process": "PROGRAM", "filter.evil.required": "true"},
        {"diff.evil.textconv": "PROGRAM", "diff.external": "PROGRAM"},
        {"core.hooksPath": "hooks"},
        {"core.pager": "PROGRAM", "pager.status": "true", "core.editor": "PROGRAM", "core.sshCommand": "PROGRAM"},
        {"alias.status": "!PROGRAM", "alias.rev-parse": "!PROGRAM"},
        {"include.path": "../settings"},
        {"extensions.partialClone": "origin", "remote.origin.promisor": "true", "remote.origin.url": "ext::PROGRAM"},
        {"core.worktree": "../elsewhere"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_programs_that_the_repository_names_are_not_run(
    settings: dict[str, str], repository: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = git(repository, "rev-parse", "HEAD")
    (repository / "settings").write_text(f'[filter "evil"]\n\tclean = {canary}\n')
    (repository / "hooks").mkdir()
    for name in ("post-index-change", "fsmonitor-watchman", "reference-transaction"):
        shutil.copy(canary, repository / "hooks" / name)
    for name, value in settings.items():
        git(repository, "config", name, value.replace("PROGRAM", str(canary)))
    monkeypatch.chdir(repository)
    assert provenance()["git"] == {"revision": revision, "dirty": False}
    (repository / "code.py").write_text("2\n")
    assert provenance()["git"] == {"revision": revision, "dirty": True}
    assert not (repository / "ran").exists()


def test_nothing_of_a_submodule_is_run(
    repository: Path, canary: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    git(other, "init")
    (other / "file").write_text("1")
    git(other, "add", "file")
    git(other, "commit", "-m", "first")
    git(repository, "-c", "protocol.file.allow=always", "submodule", "add", str(other), "inner")
    git(repository, "commit", "-m", "second")
    git(repository / "inner", "config", "filter.evil.clean", str(canary))
    (repository / "inner" / ".gitattributes").write_text("* filter=evil\n")
    os.utime(repository / "inner" / "file", (1, 1))
    assert provenance(repository)["git"] == {"revision": git(repository, "rev-parse", "HEAD"), "dirty": False}
    assert not (repository / "ran").exists()


def test_forms_of_repositories(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Packed references, detached heads, other working trees, settings about files, staged changes, split indexes."""
    revision = git(repository, "rev-parse", "HEAD")
    git(repository, "pack-refs", "--all")
    git(repository, "gc")
    assert provenance(repository)["git"] == {"revision": revision, "dirty": False}
    other = tmp_path_factory.mktemp("trees") / "other"
    git(repository, "worktree", "add", str(other))
    assert provenance(other)["git"] == {"revision": revision, "dirty": False}
    (other / "code.py").write_text("2\n")
    git(other, "commit", "-a", "-m", "second")
    assert provenance(other)["git"] == {"revision": git(other, "rev-parse", "HEAD"), "dirty": False}
    git(repository, "checkout", "--detach")
    git(repository, "config", "core.fileMode", "false")
    (repository / "code.py").chmod(0o755)
    assert provenance(repository)["git"] == {"revision": revision, "dirty": False}
    git(repository, "config", "core.fileMode", "true")
    assert provenance(repository)["git"] == {"revision": revision, "dirty": True}
    (repository / "code.py").chmod(0o644)
    git(repository, "update-index", "--split-index")
    (repository / "new.py").write_text("1\n")
    git(repository, "add", "new.py")
    assert provenance(repository)["git"] == {"revision": revision, "dirty": True}
    git(repository, "commit", "-m", "third")
    assert provenance(repository)["git"] == {"revision": git(repository, "rev-parse", "HEAD"), "dirty": False}


@pytest.mark.parametrize("head", ["ref: ../../secret", "ref: refs/heads/../../../secret", "x" * 100, "", "ref: refs/a"])
def test_a_damaged_repository_is_no_error(head: str, repository: Path) -> None:
    (repository.parent / "secret").write_text("a" * 40)
    (repository / ".git" / "HEAD").write_text(head)
    assert provenance(repository)["git"] is None


def test_a_repository_with_hashes_of_256_bits(tmp_path: Path) -> None:
    git(tmp_path, "init", "--object-format=sha256")
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-m", "first")
    assert provenance(tmp_path)["git"] == {"revision": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}


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


@pytest.mark.parametrize("value", [3, {"git": 3}, {"packages": []}, {"processes": torch.ones(2)}, {"processes": "2"}])
def test_what_no_run_has_written_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="is not a provenance"):
        check_provenance(value)


def test_a_provenance_of_earlier_versions_may_lack_anything() -> None:
    for value in ({}, {"processes": None}, {"processes": 2, "git": None, "packages": {}}):
        check_provenance(value)
