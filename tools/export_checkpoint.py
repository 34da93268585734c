"""Write trained weights as UNITER and VILLA released theirs.

    python tools/export_checkpoint.py outputs/vqa/villa villa_vqa.pt
    python tools/export_checkpoint.py weights.pt villa_vqa.safetensors --layout villa

The source is a run's output folder (its best checkpoint is taken), a checkpoint's folder, or a file of weights.
docs/checkpoints.md tells what can be done with the result.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from villa.command import Parser, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Export; return the exit code: 0, or 2 for a mistake in the input, reported in one line on stderr."""
    return run_command("export_checkpoint", lambda: _export(argv))


def _export(argv: Sequence[str] | None) -> int:
    parser = Parser("export_checkpoint", description=__doc__)
    parser.add_argument("source", help="run, checkpoint or file of weights")
    parser.add_argument("output", help="file to write")
    parser.add_argument("--layout", choices=("uniter", "villa"), default="uniter", help="names of the parameters")
    parser.add_argument("--format", choices=("pt", "safetensors"), help="by default as the output is called")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    options = parser.parse_args(argv)
    from villa.convert.checkpoints import export_checkpoint

    report = export_checkpoint(
        options.source, options.output, layout=options.layout, file_format=options.format, force=options.force
    )
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
