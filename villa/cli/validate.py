"""``villa_validate``: say whether a file can be submitted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from villa.cli.command import Parser, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; ``villa_validate --help`` describes it.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit code: 0 for a valid file, 2 for one that is not or another mistake (reported in one line on stderr),
        130 when interrupted.
    """
    return run_command("villa_validate", lambda: _validate(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "villa_validate",
        description="Check a submission file. Exit code 0: it is valid; 2: it is not, and one line says why.",
        epilog="villa_run --list submissions describes the tasks.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="the submission file")
    parser.add_argument("--task", required=True, help="the format: vqa, vcr, nlvr2, ...")
    parser.add_argument(
        "--ids",
        metavar="PATH",
        type=Path,
        help="ids that the file must have: a text database's folder, .json, .jsonl, or a text file with one a line",
    )
    parser.add_argument("--user-dir", metavar="PATH", help="package or module that registers a format of your own")
    return parser


def _validate(options: argparse.Namespace) -> int:
    from villa.evaluation.submissions.ids import read_ids
    from villa.plugins import load_user_dir
    from villa.registry import SUBMISSIONS

    if options.user_dir is not None:
        load_user_dir(options.user_dir)
    submission = SUBMISSIONS.get(options.task)()
    ids = None if options.ids is None else read_ids(options.ids)
    report = submission.validate(options.file, ids)
    print("\\n".join(f"{options.file}: {report}".splitlines()))  # a name may hold line breaks
    return 0


if __name__ == "__main__":
    sys.exit(main())
