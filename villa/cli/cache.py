"""``villa_cache``: list what villa keeps in its cache folder, and remove it; everything there is made again on use."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from villa.command import Parser, run_command, show
from villa.errors import ConfigError, StorageError
from villa.files import locked

#: What villa keeps, by the name of its folder.
KINDS = {
    "grid": "features of images",
    "indexes": "indexes of databases and tables",
    "synthetic": "generated data sets",
    "tsv": "indexes of feature files",
}
_DAY = 24 * 60 * 60
_LOCK = ".lock"


@dataclass(frozen=True)
class Entry:
    """Something in the cache.

    Attributes:
        kind: a key of ``KINDS``.
        path: its file or folder.
        size: bytes on the disk.
        changed: seconds since the epoch when it was last written.
    """

    kind: str
    path: Path
    size: int
    changed: float


def entries(root: Path) -> Iterator[Entry]:
    """Yield what villa has put into a cache folder; links, and what others have put there, are left alone."""
    for kind in KINDS:
        with suppress(FileNotFoundError, NotADirectoryError):
            for path in sorted((root / kind).iterdir()):
                if path.suffix != _LOCK and not path.is_symlink() and not (root / kind).is_symlink():
                    with suppress(FileNotFoundError):  # another process is at work
                        yield Entry(kind, path, _size(path), path.stat().st_mtime)


def remove(entry: Entry) -> bool:
    """Remove an entry; return False if another process is making it.

    Raises:
        StorageError: it cannot be removed.
    """
    path = entry.path
    name = path.stem.rpartition("-")[0] if entry.kind == "indexes" else path.stem  # <name>-<stamp>.arrow
    lock = path.with_name(name + _LOCK)
    try:
        with locked(lock, wait=False):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StorageError(f"'{path}' cannot be removed: {error.strerror or error}") from error
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; ``villa_cache --help`` describes it."""
    return run_command("villa_cache", lambda: _main(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "villa_cache",
        description="List what villa keeps in its cache folder ($VILLA_CACHE, else ~/.cache/villa), or remove some of\n"
        "it. Everything there is made again when it is needed.",
        epilog="\n".join(f"  {kind:10} {content}" for kind, content in KINDS.items()),
    )
    parser.add_argument("--prune", nargs="+", metavar="KIND", help=f"remove entries: all, {', '.join(KINDS)}")
    parser.add_argument("--older-than", type=float, metavar="DAYS", help="only those that were written before")
    return parser


def _main(options: argparse.Namespace) -> int:
    from villa.datasets.cache import cache_root

    root = cache_root(None)
    if options.prune is None:
        if options.older_than is not None:
            raise ConfigError("--older-than says what --prune removes; give --prune too")
        return show(listing(root))
    unknown = next((kind for kind in options.prune if kind not in (*KINDS, "all")), None)
    if unknown is not None:
        raise ConfigError(f"--prune {unknown}: give all, or some of {', '.join(KINDS)}")
    kinds = KINDS if "all" in options.prune else options.prune
    before = time.time() - (options.older_than or 0) * _DAY
    chosen = [entry for entry in entries(root) if entry.kind in kinds and entry.changed <= before]
    removed = [entry for entry in chosen if remove(entry)]
    text = f"removed {len(removed)} of {len(chosen)}: {_shown(sum(entry.size for entry in removed))} in '{root}'\n"
    return show(text + "".join(f"in use: {entry.path}\n" for entry in chosen if entry not in removed))


def listing(root: Path) -> str:
    """Return a table of the cache's entries, and its size."""
    found = [*entries(root)]
    lines = [f"{_shown(sum(entry.size for entry in found))} in '{root}'"]
    for entry in found:
        day = time.strftime("%Y-%m-%d", time.localtime(entry.changed))
        lines.append(f"  {_shown(entry.size):>10}  {day}  {entry.kind}/{entry.path.name}")
    return "\n".join(lines) + "\n"


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.lstat().st_size
    return sum((Path(folder) / name).lstat().st_size for folder, _, names in os.walk(path) for name in names)


def _shown(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
