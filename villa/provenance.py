"""Provenance: which software made a result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Settings of git that affect how files are compared and cannot run a program.
_PLAIN = (
    *(f"core.{name}" for name in ("filemode", "symlinks", "ignorecase", "autocrlf", "eol", "trustctime", "checkstat")),
    "extensions.objectformat",
)
#: Longest chain of symbolic references; git follows as many.
_LEVELS = 5
_LARGEST = 1 << 16
_HASH = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_REFERENCE = re.compile(r"refs/[^\0-\x20\x7f~^:?*\[\\]+")


@dataclass(frozen=True)
class Repository:
    """A repository with a working tree.

    Attributes:
        tree: the working tree.
        own: folder of ``HEAD`` and ``index``.
        shared: folder of objects and branches; differs from ``own`` in trees made by ``git worktree``.
    """

    tree: Path
    own: Path
    shared: Path

    @classmethod
    def around(cls, folder: Path) -> Repository | None:
        """Return the repository that contains a folder, or None if there is none or it has no commit.

        Raises:
            OSError: its files cannot be read.
            ValueError: they are damaged.
        """
        for tree in (folder.absolute(), *folder.absolute().parents):
            own = tree / ".git"
            if own.is_file():
                own = tree / _read(own).removeprefix("gitdir: ")
            if (own / "HEAD").is_file():
                shared = own / _read(own / "commondir") if (own / "commondir").is_file() else own
                found = cls(tree, own, shared)
                return found if found._resolved("HEAD") else None
        return None

    def revision(self) -> str:
        """Return the hash of the checked-out commit."""
        found = self._resolved("HEAD")
        assert found is not None, "a repository without a commit"
        return found

    def is_dirty(self) -> bool:
        """Return whether a tracked file differs from the commit; submodules are ignored.

        Raises:
            OSError: git is not installed, or fails.
        """
        with tempfile.TemporaryDirectory() as name:
            bare = Path(name)
            (bare / "objects" / "info").mkdir(parents=True)
            (bare / "refs").mkdir()
            objects = str((self.shared / "objects").resolve())
            if "\n" in objects or objects.startswith('"'):
                raise ValueError(f"objects of a repository at {objects!r}")
            (bare / "objects" / "info" / "alternates").write_text(f"{objects}\n")
            (bare / "HEAD").write_text(f"{self.revision()}\n")
            # Version 1, so that git heeds extensions.
            settings = {"core.repositoryformatversion": "1", **self._plain_settings(bare)}
            parts = ((*key.split("."), value) for key, value in settings.items())
            (bare / "config").write_text("".join(f"[{part}]\n{name} = {value}\n" for part, name, value in parts))
            for split in self.own.glob("sharedindex.*"):
                (bare / split.name).symlink_to(split.resolve())
            status = ("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all", "--no-renames")
            return bool(_git(bare, *status, GIT_INDEX_FILE=str(self.own / "index"), GIT_WORK_TREE=str(self.tree)))

    def _plain_settings(self, bare: Path) -> dict[str, str]:
        file = self.shared / "config"
        listed = ("config", "--file", str(file), "--no-includes", "--null", "--list")
        entries = _git(bare, *listed).split("\0") if file.is_file() else []
        pairs = (entry.partition("\n") for entry in entries)
        return {key: value for key, _, value in pairs if key in _PLAIN and re.fullmatch(r"\w+", value)}

    def _resolved(self, name: str) -> str | None:
        """Return the hash that a reference points to, or None if there is no commit yet."""
        for _ in range(_LEVELS):
            places = (folder / name for folder in (self.own, self.shared))
            text = next((_read(place) for place in places if place.is_file()), None) or self._packed().get(name, "")
            if _HASH.fullmatch(text):
                return text
            name = text.removeprefix("ref: ")
            if not _REFERENCE.fullmatch(name) or ".." in name:
                return None
        return None

    def _packed(self) -> dict[str, str]:
        file = self.shared / "packed-refs"
        lines = file.read_text().splitlines() if file.is_file() else []
        pairs = (line.partition(" ") for line in lines if not line.startswith(("#", "^")))
        return {name: value for value, _, name in pairs}


def _read(path: Path) -> str:
    """Return the text of one of git's small files."""
    with path.open("rb") as file:
        return file.read(_LARGEST).decode().removesuffix("\n")


def _git(repository: Path, *arguments: str, **variables: str) -> str:
    """Run git on a repository without the settings of the system or the user; return its output."""
    git = shutil.which("git")
    if git is None:
        raise FileNotFoundError("git")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    alone = {
        "GIT_DIR": str(repository),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_ALLOW_PROTOCOL": "",
        "GIT_TERMINAL_PROMPT": "0",
    }
    try:
        done = subprocess.run(  # noqa: S603 (git alone)
            [git, *arguments], capture_output=True, text=True, timeout=30, check=True, env=kept | alone | variables
        )
    except subprocess.SubprocessError as error:
        raise OSError(f"git fails: {error}") from error
    return done.stdout


_PACKAGES = ("villa", "torch", "transformers", "tokenizers", "safetensors", "omegaconf", "numpy")


def provenance(folder: Path | None = None) -> dict[str, Any]:
    """Describe the software, independently of time, host name and paths.

    Args:
        folder: folder of the user's code; None is the working directory.

    Returns:
        ``python``, ``system`` and ``machine``; ``packages``: versions, None for a package that is not installed;
        ``git``: ``{"revision", "dirty"}`` of the folder, or None outside a repository or without git. Untracked
        files (a run's own output among them) do not make it dirty.
    """
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git": _revision(folder or Path.cwd()),
    }


def check_provenance(value: Any) -> None:
    """Check that a value read from a file could come from ``provenance``; keys may be missing.

    Raises:
        ValueError: it could not.
    """
    known = isinstance(value, dict) and all(isinstance(value.get(key), dict | None) for key in ("packages", "git"))
    if not known or not isinstance(value.get("processes"), int | None):
        raise ValueError(f"{value!r:.60} is not a provenance")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _revision(folder: Path) -> dict[str, Any] | None:
    try:
        repository = Repository.around(folder)
        if repository is None:
            return None
        return {"revision": repository.revision(), "dirty": repository.is_dirty()}
    except (OSError, ValueError):
        return None
