"""Write trained weights as UNITER and VILLA released theirs.

    python tools/export_checkpoint.py outputs/vqa/villa villa_vqa.pt
    python tools/export_checkpoint.py weights.pt villa_vqa.safetensors --layout villa

The source is a run's output folder (its best checkpoint is taken), a checkpoint's folder, or a file of weights.
docs/checkpoints.md tells what can be done with the result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from villa.errors import ConfigError, VillaError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help shows the usage")


def main(argv: Sequence[str] | None = None) -> int:
    """Export; return the exit code: 0, or 2 for a mistake in the input, reported in one line on stderr."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="run, checkpoint or file of weights")
    parser.add_argument("output", help="file to write")
    parser.add_argument("--layout", choices=("uniter", "villa"), default="uniter", help="names of the parameters")
    parser.add_argument("--format", choices=("pt", "safetensors"), help="by default as the output is called")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    try:
        options = parser.parse_args(argv)
        from villa.models.export import export_checkpoint

        print(
            export_checkpoint(
                options.source,
                options.output,
                layout=options.layout,
                file_format=options.format,
                force=options.force,
            )
        )
    except VillaError as error:
        print(f"export_checkpoint: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
