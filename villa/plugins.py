"""Plug-ins: packages outside villa that register classes when they are imported."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path

from villa.errors import ConfigError, one_line
from villa.files import plain_path
from villa.recipes import shipped

__all__ = ["ENTRY_POINT_GROUP", "failures", "load_user_dir", "one_line"]

ENTRY_POINT_GROUP = "villa.plugins"


@cache
def failures() -> dict[str, str]:
    """Import every installed plug-in once; return the failed ones, each with its reason in one line."""
    import importlib.metadata  # slow to import

    failed: dict[str, str] = {}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()
        except (Exception, SystemExit) as error:
            failed[f"{entry.name} ({entry.value})"] = one_line(error)
    return failed


def load_user_dir(path: str) -> None:
    """Import the package or module at ``path``, or of that name among villa's projects, so that its decorators run.

    Raises:
        ConfigError: the path does not exist, or the import fails (the message says where and why).
        DataError: it is not a path; see ``plain_path``.
    """
    location = plain_path(path).resolve()
    if not location.exists():
        location = shipped(path) or location
    if not location.exists():
        raise ConfigError(f"user_dir '{path}' does not exist; give a package folder or a .py file")
    if location.is_dir() and not (location / "__init__.py").is_file():
        raise ConfigError(f"user_dir '{path}' has no __init__.py; give a package folder or a .py file")
    name = location.stem if location.is_file() else location.name
    if "." in name:
        raise ConfigError(f"user_dir '{path}': '{name}' cannot be imported, for its dot; rename it")
    present = sys.modules.get(name)
    if present is not None:
        if Path(getattr(present, "__file__", None) or "").resolve() in (location, location / "__init__.py"):
            return
        raise ConfigError(f"user_dir '{path}': a module called '{name}' is loaded already; rename the folder")
    sys.path.insert(0, str(location.parent))
    try:
        importlib.import_module(name)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"user_dir '{path}' failed to import: {one_line(error)}") from error
    finally:
        sys.path.remove(str(location.parent))
