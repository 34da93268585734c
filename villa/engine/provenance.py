"""Provenance: which software made a result."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from villa.engine.repository import Repository

_PACKAGES = ("villa", "torch", "transformers", "tokenizers", "safetensors", "omegaconf", "numpy")


def provenance(folder: Path | None = None) -> dict[str, Any]:
    """Describe the software; nothing in it depends on the time, the host's name or a path.

    Args:
        folder: where the user's code lies; None is the working directory.

    Returns:
        ``python``, ``system`` and ``machine``; ``packages``: versions, None for one that is not installed;
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
