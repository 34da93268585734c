"""``villa_validate``: say whether a file can be submitted, or whether what lies on the disk is intact."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from villa.cli.command import Parser, printable, run_command
from villa.errors import ConfigError, DataError


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
        description="Check a submission file (--task), or that a model is intact: a run, a checkpoint, a saved folder, "
        "a file of weights. Exit code 0: all is well; 2: it is not, and one line says why.",
        epilog="villa_run --list submissions describes the tasks.",
    )
    parser.add_argument("file", metavar="PATH", type=Path, help="the submission file, or what is to be intact")
    parser.add_argument("--task", help="the submission's format: vqa, vcr, nlvr2, ...")
    parser.add_argument(
        "--ids",
        metavar="PATH",
        type=Path,
        help="ids that the file must have: a text database's folder, .json, .jsonl, or a text file with one a line",
    )
    parser.add_argument("--user-dir", metavar="PATH", help="package or module that registers a format of your own")
    return parser


def _validate(options: argparse.Namespace) -> int:
    for report in _check_intact(options.file) if options.task is None else (_check_submission(options),):
        line = "\\n".join(report.splitlines())  # a name may hold line breaks
        print(printable(line, sys.stdout), flush=True)
    return 0


def _check_submission(options: argparse.Namespace) -> str:
    from villa.evaluation.submissions.ids import read_ids
    from villa.plugins import load_user_dir
    from villa.registry import SUBMISSIONS

    if options.user_dir is not None:
        load_user_dir(options.user_dir)
    submission = SUBMISSIONS.get(options.task)()
    ids = None if options.ids is None else read_ids(options.ids)
    return f"{options.file}: {submission.validate(options.file, ids)}"


def _check_intact(path: Path) -> Iterator[str]:
    from villa.hub.intact import check_model, is_model

    #: What a path may be, and what says in lines that it is intact, or raises a VillaError.
    kinds: tuple[tuple[Callable[[Path], bool], Callable[[Path], Iterator[str]]], ...] = ((is_model, check_model),)
    for is_kind, check in kinds:
        if is_kind(path):
            return check(path)
    if not path.exists():
        raise DataError(f"'{path}' does not exist; mend the path")
    raise ConfigError(f"'{path}' is no run, checkpoint, saved folder or file of weights; a submission needs --task")


if __name__ == "__main__":
    sys.exit(main())
