"""``villa_cache``: list what villa keeps in its cache folder, and remove it; everything there is made again on use."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from villa.command import Parser, run_command, show
from villa.datasets.cache_folder import KINDS, cache_root, entries, remove
from villa.errors import ConfigError

_DAY = 24 * 60 * 60


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
    root = cache_root()
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


def _shown(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
