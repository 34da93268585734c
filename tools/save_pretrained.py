"""Save a trained model as a folder that villa, transformers and the hub of models load.

    python tools/save_pretrained.py outputs/own_data/villa outputs/own_data/saved

The source is a run's output folder (its best checkpoint is taken), a checkpoint's folder, or a folder that was saved
before. docs/hub.md tells what is in the result and how it is used.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from villa.command import Parser, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Save; return the exit code: 0, or 2 for a mistake in the input, reported in one line on stderr."""
    return run_command("save_pretrained", lambda: _save(argv))


def _save(argv: Sequence[str] | None) -> int:
    parser = Parser("save_pretrained", description=__doc__)
    parser.add_argument("source", help="run, checkpoint or saved folder")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--user-dir", "--user_dir", help="package or module to import first, for a model of your own")
    options = parser.parse_args(argv)
    import villa

    folder = villa.from_pretrained(options.source, device="cpu", user_dir=options.user_dir).save_pretrained(
        options.output
    )
    print(f"written to {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
