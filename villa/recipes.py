"""The recipes that come with villa, found by name: ``villa/easy_vqa`` is ``projects/villa/easy_vqa.yaml``.

They are the folder ``projects`` of the checkout, which the wheel holds as ``villa/projects``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import takewhile
from pathlib import Path, PurePosixPath

from villa.errors import DataError, nearest
from villa.files import from_home

#: First part of a name that may be left out, as in the paths of the documentation.
PROJECTS = "projects"
_SUFFIX = ".yaml"
_COMMANDS = ("villa_run ", "python ")


def home() -> Path:
    """Return the folder of the recipes: of the installed package, or of the checkout."""
    package = Path(__file__).parent
    installed = package / PROJECTS
    return installed if installed.is_dir() else package.parent / PROJECTS


def shipped(name: str, fits: Callable[[Path], bool] = Path.exists) -> Path | None:
    """Return the file or folder that comes with villa under ``name``, with or without ``projects/`` and ``.yaml``.

    Args:
        name: relative path, without ``..``.
        fits: whether a path is of the kind that is wanted.
    """
    parts = PurePosixPath(name).parts
    parts = parts[1:] if parts[:1] == (PROJECTS,) else parts
    if not parts or {"..", "/"} & {*parts} or "\0" in name:
        return None
    path = home().joinpath(*parts)
    return next((found for found in (path, path.with_name(path.name + _SUFFIX)) if fits(found)), None)


def locate(path: str, name: str | None = None) -> str:
    """Return where a recipe is: at ``path``, or else among those that come with villa.

    Args:
        path: local path, with or without ``.yaml``, or a URI.
        name: its name there; by default ``path``.

    Returns:
        The path of a file, or ``path`` if there is none.
    """
    try:
        local = from_home(path)
        if "://" in path or (local.exists() and not local.is_dir()):
            return path
        if local.with_name(local.name + _SUFFIX).is_file():
            return path + _SUFFIX
        found = shipped(name or path, Path.is_file)
    except (DataError, OSError, ValueError):  # opening it says what is wrong
        return path
    return path if found is None else str(found)


@cache
def names() -> list[str]:
    """Return the names of the recipes that come with villa, without those that others only include."""
    root = home()
    found = (file.relative_to(root).with_suffix("") for file in root.rglob(f"*{_SUFFIX}"))
    return sorted(path.as_posix() for path in found if not path.name.startswith("_"))


def summary(name: str) -> str:
    """Return the first line of the comment at the head of a recipe that is no command."""
    lines = (home() / f"{name}{_SUFFIX}").read_text(encoding="utf-8").splitlines()
    comment = (line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return next((line for line in comment if line and not line.startswith(_COMMANDS)), "")


def suggestion(path: str) -> str:
    """Return ``"; did you mean 'x'?"`` with the nearest name of a recipe, or an empty string."""
    plain = path.removesuffix(_SUFFIX)
    return nearest(plain.removeprefix(f"{PROJECTS}/"), names(), least=0.8)
