"""Make a whole checkpoint of one whose tensors lie in shards.

    python tools/consolidate_checkpoint.py outputs/vqa/villa outputs/vqa/whole

The source is a checkpoint's folder or a run's output folder (its best checkpoint is taken). The result is an ordinary
checkpoint: weights and the optimiser's state in one file each, to start from, to go on from, or to give away.
docs/saving.md tells more.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from villa.command import Parser, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Consolidate; return the exit code: 0, or 2 for a mistake in the input, reported in one line on stderr."""
    return run_command("consolidate_checkpoint", lambda: _consolidate(argv))


def _consolidate(argv: Sequence[str] | None) -> int:
    parser = Parser("consolidate_checkpoint", description=__doc__)
    parser.add_argument("source", type=Path, help="run or checkpoint")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that is there")
    options = parser.parse_args(argv)
    from villa.convert.checkpoints import consolidate

    print(consolidate(options.source, options.output, force=options.force))
    return 0


if __name__ == "__main__":
    sys.exit(main())
