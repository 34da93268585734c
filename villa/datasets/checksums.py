"""Checksums of databases that villa writes: sizes are compared at every start, contents on request."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from villa.errors import DataError, one_line
from villa.files import write_json

SUFFIX = ".checksums"
_ADVICE = f"copy it again, or make it again; if it was changed on purpose, remove the {SUFFIX} file"


def write_checksums(file: Path, paths: Iterable[Path]) -> None:
    """Write the sizes and SHA-256 of files beside or below ``file``.

    Raises:
        DataError: the disk is full, or a file cannot be read.
    """
    from villa.checkpoints.files import listed  # slow to import

    try:
        write_json(file, {"files": listed(file.parent, paths)})
    except OSError as error:
        raise DataError(f"cannot write '{file}' ({one_line(error)}); check the disk, and run again") from error


def check_sizes(file: Path) -> None:
    """Compare the sizes of files with those in ``file``; databases made by others have none.

    Raises:
        DataError: naming the first file that differs.
    """
    for name, expected in _read(file).items():
        path = file.parent / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected.get("size"):
            found = "is missing" if size is None else f"has {size:,} bytes, not {expected.get('size')}"
            raise DataError(f"'{path}' {found} as when it was made; {_ADVICE}")


def verify(file: Path) -> int:
    """Compare the contents of files with those in ``file``.

    Returns:
        Number of files compared; 0 without ``file``.

    Raises:
        DataError: naming the first file that differs.
    """
    from villa.checkpoints.files import file_problem

    files = _read(file)
    for name, expected in files.items():
        problem = file_problem(file.parent, name, expected, said_by=file.name)
        if problem:
            raise DataError(f"'{file.parent / name}' {problem}; {_ADVICE}")
    return len(files)


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        files = json.loads(file.read_bytes())["files"]
        if all(isinstance(expected, dict) for expected in files.values()):
            return dict(files)
        raise ValueError("no sizes in it")
    except FileNotFoundError:
        return {}
    except Exception as error:
        raise DataError(f"'{file}' cannot be used ({one_line(error)}); {_ADVICE}") from error
