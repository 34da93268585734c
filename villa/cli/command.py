"""What commands and tools share: every mistake in their input is one line on stderr and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

from villa.errors import ConfigError, MissingDataError, VillaError
from villa.mapped_files import name_damaged_files

INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """A parser that reports mistakes as ``ConfigError``; options cannot be abbreviated."""

    def __init__(self, prog: str, *, add_help: bool = True, description: str | None = None, epilog: str | None = None):
        super().__init__(
            prog=prog,
            add_help=add_help,
            allow_abbrev=False,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{message}; {self.prog} --help shows the usage")


def run_command(name: str, action: Callable[[], int]) -> int:
    """Run a command's action and return the exit code: its own, 2 for a mistake in the input, 130 when interrupted.

    Args:
        name: of the command, for the message on stderr.
        action: parses the arguments and does the work.
    """
    name_damaged_files()
    try:
        return action()
    except VillaError as error:
        several = isinstance(error, MissingDataError)
        problem, code = str(error) if several else "\\n".join(str(error).splitlines()), error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    # After the block: progress bars are gone by now.
    print(printable(f"{name}: error: {problem}", sys.stderr), file=sys.stderr)
    return code


def printable(text: str, stream: TextIO) -> str:
    """Return a text with what the stream cannot show written as escapes, as in the names of some files."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
