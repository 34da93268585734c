"""Files: paths and URLs, writes that survive a crash, checksums."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import http.client
import json
import os
import re
import secrets
import shlex
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from villa.errors import DataError, StorageError, VillaError, one_line
from villa.json_values import parse_json

_URL_PREFIXES = ("http://", "https://")
_FILE = "file://"
_SCHEME = re.compile(r"[A-Za-z][\w+.-]*://", re.ASCII)
#: URLs that only the recipe inside a trained model names.
_refused: set[str] = set()
#: Full disk, quota used up, file at the process's size limit (``ulimit -f``).
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: The messages of libraries with errors of their own: safetensors, LMDB and torch; and NumPy, which gives no number.
_FULL_MESSAGES = {
    **{rf"os error {number}\b|{os.strerror(number)}": number for number in _FULL},
    r"\d+ requested and \d+ written": errno.ENOSPC,
}


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
        uri: a path (``~`` is the home folder) or an http(s) URL.

    Raises:
        DataError: the URL cannot be downloaded or was refused (``refuse_addresses``), or ``plain_path`` refuses the
            path.
    """
    if not uri.startswith(_URL_PREFIXES):
        return Path(_path_manager().get_local_path(str(plain_path(uri))))
    check_address(uri)
    if ".." in urlsplit(uri).path.split("/"):  # iopath would write outside its cache
        raise DataError(f"'{uri}' has '..' in its path; give the plain URL of a file")
    from iopath.common.file_io import get_cache_dir

    # iopath names a cached file by the URL's path alone: one folder per URL keeps two hosts apart.
    folder = Path(get_cache_dir()) / hashlib.sha256(uri.encode()).hexdigest()[:16]
    try:
        return Path(_path_manager().get_local_path(uri, cache_dir=str(folder)))
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DataError(
            f"cannot download '{uri}': {one_line(error)}; check the address or give a local path"
        ) from error


def check_address(uri: str) -> None:
    """Check that the user gave an address, not only the recipe inside a trained model.

    Raises:
        DataError: that recipe alone names it (``refuse_addresses``).
    """
    if uri in _refused:
        raise DataError(
            f"'{uri}' is not fetched just because the recipe inside a trained model names it; if you trust it, give "
            "the option that it is in yourself"
        )


def is_url(text: str) -> bool:
    """Return whether a text starts with a URL's scheme: ``https://``, ``s3://``."""
    return _SCHEME.match(text) is not None


def from_home(text: str | Path) -> Path:
    """Return a path in which a leading ``~`` is the home folder, or ``~name`` that of a user.

    Raises:
        DataError: there is no such user, or the path contains a NUL.
    """
    if "\0" in str(text):
        raise DataError(f"the path {text!r:.60} holds a NUL, which no file name can have; mend it")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise DataError(f"'{text}' starts with '~', but there is no such home folder; give a full path") from error


def plain_path(text: str) -> Path:
    """Return the path of a file or folder of this machine, from a path (``~`` is the home folder) or a ``file://`` URL.

    Raises:
        DataError: it is another URL (which ``Path`` would turn into ``https:/...``), or ``from_home`` refuses it.
    """
    if text.startswith(_FILE):
        host, _, path_of_url = text.removeprefix(_FILE).partition("/")
        if host in ("", "localhost"):
            return from_home(f"/{unquote(path_of_url)}")
    path = from_home(text)
    if is_url(text) and not os.path.exists(path):  # noqa: PTH110 (pathlib raises for a name that is too long)
        raise DataError(f"'{text}' is a URL, and is not fetched here; download it and give the path of what you have")
    return path


def regular_file(path: Path) -> os.stat_result:
    """Return the ``stat`` of a regular file; call it first so as not to open a pipe or device and wait forever.

    Raises:
        OSError: the file does not exist or is not a regular file.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
        raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))
    return found


def is_endless(path: Path) -> bool:
    """Say whether a path is a pipe, socket or device, reading which may never end."""
    return path.exists() and not (path.is_file() or path.is_dir())


def refuse_addresses(stored: Iterable[str], given: Iterable[str]) -> None:
    """Refuse to download the URLs of a stored recipe, which is not trusted, unless the user gives them too.

    Args:
        stored: texts of the recipe inside a trained model; those that are not URLs are ignored.
        given: texts that the user gave.
    """
    _refused.update(text for text in stored if text.startswith((*_URL_PREFIXES, "hf://")))
    _refused.difference_update(given)


def no_space(error: BaseException | None) -> str | None:
    """Return ``"no space left"`` and why if a full disk caused the error, in whatever library; else None."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number is None and not isinstance(error, VillaError):
            number = next((code for text, code in _FULL_MESSAGES.items() if re.search(text, str(error))), None)
        if number in _FULL:
            return "no space left" if number == errno.ENOSPC else f"no space left ({os.strerror(number)})"
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def room_for(path: Path | str) -> Iterator[None]:
    """Turn the errors of a full disk into a ``StorageError`` of one line; other errors pass.

    Args:
        path: file or folder being written.

    Raises:
        StorageError: the disk is full.
    """
    try:
        yield
    except Exception as error:  # torch, safetensors and LMDB have their own
        problem = None if isinstance(error, VillaError) else no_space(error)
        if problem is None:
            raise
        raise StorageError(
            f"{problem} in '{path}'; make room, and start again, a run with checkpoint.resume=true"
        ) from error


def open_own(path: Path, mode: str = "ab") -> IO[Any]:
    """Open a regular file for writing, creating it if need be, and never through a symbolic link.

    In a folder that others can write to, a link of that name would let them choose which file is changed.

    Args:
        path: the file.
        mode: as for ``open``; ``wb`` empties the file only after these checks.

    Raises:
        OSError: it is a symbolic link, not a regular file, or cannot be written.
    """
    flags = {"a": os.O_WRONLY | os.O_APPEND, "r": os.O_RDWR, "w": os.O_RDWR}[mode[0]]
    try:  # O_NONBLOCK: a FIFO without a reader would block
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            kind = "a symbolic link" if error.errno == errno.ELOOP else "no regular file"
            raise OSError(error.errno, f"it is {kind}", str(path)) from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        os.set_blocking(descriptor, True)
        if mode[0] == "w":
            os.ftruncate(descriptor, 0)
        return os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8")
    except BaseException:
        os.close(descriptor)
        raise


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[IO[Any]]:
    """Hold a lock file, which is created if need be and never changed.

    Args:
        path: the file.
        wait: whether to wait for another process that holds it.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is false.
        OSError: it cannot be opened (see ``open_own``), or the file system has no locks.
    """
    while True:
        with open_own(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if is_at(file.fileno(), path):  # else its last holder removed it, and others will lock a new file
                yield file
                return


def is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is still the one at ``path``: nobody has removed or moved it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush a folder and everything below it to the disk."""
    for path in folder.rglob("*"):
        fsync(path)
    fsync(folder)


def follow_umask(path: Path) -> None:
    """Give a file the permissions of a newly created one; safetensors makes files readable by their owner alone."""
    made = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # asking for the mask would change it meanwhile
    made.touch(exist_ok=False)
    path.chmod(made.stat().st_mode)
    made.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; the file written there replaces it when the block succeeds.

    A crash leaves either the old contents or the new, never a part.

    Args:
        path: file to write; missing parent folders are created.

    Raises:
        StorageError: the disk is full; the old file is intact.
        OSError: the folder cannot be written.
    """
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # unique to each writer
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
        path: file to write; missing parent folders are created.
        data: the contents; text is encoded as UTF-8.

    Raises:
        OSError: as for ``replacing``.
    """
    with replacing(path) as temporary, temporary.open("xb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically, with sorted keys.

    Raises:
        ValueError: the value holds NaN or an infinity, which JSON cannot represent.
        OSError: as for ``atomic_write``.
    """
    atomic_write(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's contents as 64 hexadecimal digits.

    Raises:
        OSError: it cannot be read, or is not a regular file.
    """
    regular_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path, what: str = "file", advice: str = "mend the path") -> str:
    """Read a user's text file: UTF-8, with or without a byte-order mark.

    Args:
        path: the file.
        what: what it should be, for messages: ``answers file``.
        advice: what to do if it cannot be read.

    Raises:
        DataError: it is missing, or is not UTF-8; the message names the line.
    """
    return _decoded(_contents(path, what, advice), path, what, "utf-8-sig")


def lines_of(text: str) -> list[str]:
    r"""Return the lines of a text, split at ``\n`` or ``\r\n`` only.

    ``splitlines`` also splits at eight other characters, which occur within answers and vocabularies.
    """
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def read_json(path: Path, what: str, advice: str = "mend the path") -> Any:
    """Read a user's JSON file; see ``parse_json`` for what is refused.

    Args:
        path: the file.
        what: what it should be, for messages: ``answers``.
        advice: what to do if it cannot be read.

    Raises:
        DataError: it is missing, is not JSON, or is a pickle, which is never read.
    """
    if path.suffix in (".p", ".pkl", ".pickle"):
        code = "import json, pickle, sys; json.dump(pickle.load(open(sys.argv[1], 'rb')), open(sys.argv[2], 'w'))"
        command = shlex.join(["python", "-c", code, path.name, path.with_suffix(".json").name])
        raise DataError(
            f"'{path}' is a pickle and is not read, because that would run any code in it; if you trust its source, "
            f"convert it (with {command}) and give the .json file"
        )
    data = _contents(path, what, advice)
    text = _decoded(data, path, what, json.detect_encoding(data))  # JSON may also be UTF-16
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"the {what} '{path}' is not valid JSON ({error}); {advice}") from error


def _contents(path: Path, what: str, advice: str) -> bytes:
    try:
        size, memory = regular_file(path).st_size, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if 2 * size > memory:  # the bytes and the decoded text
            raise DataError(
                f"the {what} '{path}' has {size:,} bytes, too many for the memory of this machine; {advice}"
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: an impossible path
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot read the {what} '{path}' ({reason}); {advice}") from error


def _decoded(data: bytes, path: Path, what: str, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"the {what} '{path}' is not UTF-8 text (byte 0x{data[error.start]:02x} in line {line}); save it as UTF-8"
        ) from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``, which is renamed to ``path`` when the block succeeds.

    A crash leaves no folder of that name. If another process has created ``path`` meanwhile, that one stays.

    Args:
        path: folder to create; missing parent folders are created.

    Raises:
        OSError: it cannot be written, or ``path`` is a file.
    """
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        temporary.mkdir()
        try:
            yield temporary
            fsync_tree(temporary)
            try:
                temporary.rename(path)
            except OSError:
                if not path.is_dir():  # not because another process was first
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        fsync(path.parent)
