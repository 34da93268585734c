"""Files: paths and URLs, writes that survive a crash, checksums."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import secrets
import shlex
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from villa.errors import DataError
from villa.plugins import one_line

_URL_PREFIXES = ("http://", "https://")
#: Addresses that nobody but the recipe inside a trained model names.
_refused: set[str] = set()


@cache
def _path_manager() -> Any:
    from iopath.common.file_io import HTTPURLHandler, PathManager

    manager = PathManager()
    manager.set_logging(False)  # iopath's telemetry
    manager.register_handler(HTTPURLHandler())
    return manager


def local_path(uri: str) -> Path:
    """Return a local path for a path or URL; a URL is downloaded once and cached (``$FVCORE_CACHE``).

    Args:
        uri: a path (``~`` is the home folder) or an http(s) URL; any other prefix counts as a path.

    Raises:
        DataError: the URL cannot be downloaded or was refused (``refuse_addresses``), or the path starts with the home
            folder of an unknown user.
    """
    if not uri.startswith(_URL_PREFIXES):
        try:
            return Path(_path_manager().get_local_path(str(Path(uri).expanduser())))
        except RuntimeError as error:
            raise DataError(f"'{uri}' starts with '~', but there is no such home folder; give a full path") from error
    if uri in _refused:
        raise DataError(
            f"'{uri}' is not fetched just because the recipe inside a trained model names it; if you trust it, give "
            "the option that it is in yourself"
        )
    if ".." in urlsplit(uri).path.split("/"):  # iopath would write outside its cache
        raise DataError(f"'{uri}' has '..' in its path; give the plain URL of a file")
    from iopath.common.file_io import get_cache_dir

    # iopath names a cached file by the URL's path alone: a folder a URL keeps two hosts apart.
    folder = Path(get_cache_dir()) / hashlib.sha256(uri.encode()).hexdigest()[:16]
    try:
        return Path(_path_manager().get_local_path(uri, cache_dir=str(folder)))
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DataError(
            f"cannot download '{uri}': {one_line(error)}; check the address or give a local path"
        ) from error


def refuse_addresses(stored: Iterable[str], given: Iterable[str]) -> None:
    """Fetch nothing from the URLs of a stored recipe, which may be anybody's, unless the user gives them too.

    Args:
        stored: texts of the recipe inside a trained model; those that are no URLs do not matter.
        given: texts that the user wrote.
    """
    _refused.update(text for text in stored if text.startswith(_URL_PREFIXES))
    _refused.difference_update(given)


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below ``folder``, and itself, to the disk."""
    for path in folder.rglob("*"):
        fsync(path)
    fsync(folder)


def follow_umask(path: Path) -> None:
    """Give a file the permissions of one that this process makes; what safetensors writes is for its owner alone."""
    made = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # asking for the mask would change it meanwhile
    made.touch()
    path.chmod(made.stat().st_mode)
    made.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; the file written there takes its place when the block ends well.

    A crash leaves either the old contents or the new, never a part.

    Args:
        path: file to write; missing parent folders are made.

    Raises:
        OSError: the folder cannot be written or the disk is full; the old file is intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # its own for each of several writers
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file so that a crash leaves either the old contents or the new, never a part.

    Args:
        path: file to write; missing parent folders are made.
        data: the contents; text is written as UTF-8.

    Raises:
        OSError: as for ``replacing``.
    """
    with replacing(path) as temporary, temporary.open("xb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically, with sorted keys.

    Raises:
        ValueError: the value holds NaN or an infinity, which JSON has not.
        OSError: as for ``atomic_write``.
    """
    atomic_write(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's contents as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, what: str, advice: str = "mend the path") -> Any:
    """Read a JSON file that a user gave.

    Args:
        path: the file.
        what: what it should be, for messages: ``answers``.
        advice: what to do when it cannot be read.

    Raises:
        DataError: it is missing, is not JSON, or is a pickle, which is never read.
    """
    if path.suffix in (".p", ".pkl", ".pickle"):
        code = "import json, pickle, sys; json.dump(pickle.load(open(sys.argv[1], 'rb')), open(sys.argv[2], 'w'))"
        command = shlex.join(["python", "-c", code, path.name, path.with_suffix(".json").name])
        raise DataError(
            f"'{path}' is a pickle and is not read, for that runs whatever code is in it; if you trust its source, "
            f"convert it (with {command}) and give the .json file"
        )
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read the {what} '{path}' ({error.strerror}); {advice}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"the {what} '{path}' is not valid JSON ({str(error).splitlines()[0]}); {advice}") from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``, which gets that name when the block ends well.

    A crash leaves no folder of that name. Where another process has made it in the meantime, that one stays.

    Args:
        path: folder to make; missing parent folders are made.

    Raises:
        OSError: it cannot be written, or ``path`` is a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        fsync_tree(temporary)
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():  # another process was not first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync(path.parent)
