"""``villa_validate``: say whether a file can be submitted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from villa.errors import ConfigError, VillaError

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; ``villa_validate --help`` describes it.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit code: 0 for a valid file, 2 for one that is not or another mistake (reported in one line on stderr),
        130 when interrupted.
    """
    try:
        line = _validate(_parser().parse_args(argv))
    except VillaError as error:
        problem, code = str(error), error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    else:
        _print(line, sys.stdout)
        return 0
    _print(f"villa_validate: error: {problem}", sys.stderr)  # after the block: the progress bar is gone by now
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; villa_validate --help shows the usage")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="villa_validate",
        allow_abbrev=False,
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


def _validate(options: argparse.Namespace) -> str:
    from villa.evaluation.submissions.ids import read_ids
    from villa.plugins import load_user_dir
    from villa.registry import SUBMISSIONS

    if options.user_dir is not None:
        load_user_dir(options.user_dir)
    submission = SUBMISSIONS.get(options.task)()
    ids = None if options.ids is None else read_ids(options.ids)
    return f"{options.file}: {submission.validate(options.file, ids)}"


def _print(line: str, stream: TextIO) -> None:
    """Print a line; names of files may hold line breaks and what the terminal cannot show."""
    encoding = stream.encoding or "utf-8"
    text = "\\n".join(line.splitlines()).encode(encoding, "backslashreplace").decode(encoding)
    print(text, file=stream)


if __name__ == "__main__":
    sys.exit(main())
