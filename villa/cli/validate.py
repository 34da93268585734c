"""``villa_validate``: say whether a file can be submitted, or whether data, features and weights are intact."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from villa.cli.command import Parser, printable, run_command


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
        description="Check a submission file (--task); or read a database, feature file or folder, feature cache,\n"
        "checkpoint or saved folder through. Exit code 0: it is valid; 2: it is not, and one line says why.",
        epilog="villa_run --list submissions describes the tasks.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="the submission file, or the file or folder of data")
    parser.add_argument("--task", help="the format of the submission: vqa, vcr, nlvr2, ...")
    parser.add_argument("--allow-empty-boxes", action="store_true", help="accept boxes without width or height")
    parser.add_argument(
        "--ids",
        metavar="PATH",
        type=Path,
        help="ids that the file must have: a text database's folder, .json, .jsonl, or a text file with one a line",
    )
    parser.add_argument(
        "--user-dir", "--user_dir", metavar="PATH", help="package or module that registers a format of your own"
    )
    return parser


def _validate(options: argparse.Namespace) -> int:
    if options.task is None:
        from villa.datasets.validation import validate

        found = validate(options.file, allow_empty_boxes=options.allow_empty_boxes)
        print(printable(f"{options.file}: {found}", sys.stdout))
        return 0
    from villa.evaluation.submissions.ids import read_ids
    from villa.plugins import load_user_dir
    from villa.registry import SUBMISSIONS

    if options.user_dir is not None:
        load_user_dir(options.user_dir)
    submission = SUBMISSIONS.get(options.task)()
    ids = None if options.ids is None else read_ids(options.ids)
    report = submission.validate(options.file, ids)
    line = "\\n".join(f"{options.file}: {report}".splitlines())  # a name may hold line breaks
    print(printable(line, sys.stdout))
    return 0


if __name__ == "__main__":
    sys.exit(main())
