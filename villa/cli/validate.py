"""``villa_validate``: check a submission file, or whether data or a model on the disk are intact."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from villa.command import Parser, run_command
from villa.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; ``villa_validate --help`` describes it.

    Args:
        argv: the arguments; None uses those of the process.

    Returns:
        The exit code: 0 for a valid file, 2 for an invalid one or another mistake (reported in one line on stderr),
        130 when interrupted.
    """
    return run_command("villa_validate", lambda: _validate(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "villa_validate",
        description="Check a submission file (--task), or read through what lies on the disk: a run, checkpoint,\n"
        "saved folder or file of weights; a database, feature file or folder, or feature cache; JSON lines, tables,\n"
        "archives and folders of images (docs/data_sources.md). Exit code 0: all is well; 2: it is not, and one line\n"
        "says why.",
        epilog="villa_run --list submissions describes the tasks.",
    )
    parser.add_argument("file", metavar="PATH", help="the submission file, or what is to be intact")
    parser.add_argument("--task", help="the format of the submission: vqa, vcr, nlvr2, ...")
    parser.add_argument("--allow-empty-boxes", action="store_true", help="accept boxes without width or height")
    parser.add_argument(
        "--column",
        metavar="FIELD=NAME",
        action="append",
        default=[],
        help="the column of a field, as in dataset.columns",
    )
    parser.add_argument("--question", metavar="TEXT", help="question of rows without one, as dataset.question")
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
    for report in _check_intact(options) if options.task is None else (_check_submission(options),):
        line = "\\n".join(report.splitlines())  # a name may hold line breaks
        print(line, flush=True)
    return 0


def _check_submission(options: argparse.Namespace) -> str:
    from villa.evaluation.submissions.base import read_ids
    from villa.plugins import load_user_dir
    from villa.registry import SUBMISSIONS

    if options.user_dir is not None:
        load_user_dir(options.user_dir)
    submission = SUBMISSIONS.get(options.task)()
    ids = None if options.ids is None else read_ids(options.ids)
    return f"{options.file}: {submission.validate(Path(options.file), ids)}"


def _check_intact(options: argparse.Namespace) -> Iterator[str]:
    from villa.datasets.sources.opening import is_address
    from villa.datasets.validation import holds_features, validate, validate_rows
    from villa.hub.intact import check_model, is_model

    path, columns = Path(options.file), dict(map(_column, options.column))
    if columns or options.question is not None or is_address(options.file):
        return iter((f"{options.file}: {validate_rows(options.file, columns, options.question)}",))
    if is_model(path) and not holds_features(path):
        return check_model(path)
    return iter((f"{path}: {validate(path, allow_empty_boxes=options.allow_empty_boxes)}",))


def _column(text: str) -> tuple[str, str]:
    field, equals, name = text.partition("=")
    if not (field and equals and name):
        raise ConfigError(f"--column {text!r:.60} is no field with its column; give FIELD=NAME, such as question=q")
    return field, name


if __name__ == "__main__":
    sys.exit(main())
