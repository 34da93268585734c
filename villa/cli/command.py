"""What commands and tools share: every mistake in their input is one line on stderr and an exit code."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

from villa.errors import ConfigError, MissingDataError, VillaError

INTERRUPTED = 130
#: Control characters but tabs and line breaks, and what changes the direction of writing.
_OBEYED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


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
    """Return a text with what the stream cannot show, or a terminal would obey, written as escapes."""
    encoding = stream.encoding or "utf-8"
    shown = _OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)
