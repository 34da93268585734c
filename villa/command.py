"""Parsing and running of commands and tools: a mistake in the input becomes one line on stderr and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from villa.errors import ConfigError, MissingDataError, StorageError, VillaError
from villa.files import no_space, plain_path
from villa.mapped_files import name_damaged_files
from villa.signals import Interrupted, interruptible
from villa.streams import is_broken_pipe, lasting, unprinted

_INTERRUPTED, _BROKEN_PIPE = 130, 141


class Parser(argparse.ArgumentParser):
    """A parser that reports mistakes as ``VillaError``, forbids abbreviated options and refuses URLs as paths."""

    def __init__(self, prog: str, *, add_help: bool = True, description: str | None = None, epilog: str | None = None):
        super().__init__(
            prog=prog,
            add_help=add_help,
            allow_abbrev=False,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.register("type", Path, plain_path)

    @property
    def option_strings(self) -> list[str]:
        """Every flag."""
        return [*self._option_string_actions]

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{message}; {self.prog} --help shows the usage")


def run_command(name: str, action: Callable[[], int]) -> int:
    """Run a command and return its exit code: the action's own, the error's (2 for bad input), or 128 + the signal.

    Args:
        name: the command, for the message on stderr.
        action: parses the arguments and does the work.
    """
    name_damaged_files()
    with lasting():
        try:
            with interruptible():
                return _reported(name, action)
        except Interrupted as interrupted:  # sent before the action began, or while its error was reported
            with suppress(KeyboardInterrupt):
                print(f"ended by {interrupted}", flush=True)
            return interrupted.exit_code
        except KeyboardInterrupt:
            return _INTERRUPTED


def _reported(name: str, action: Callable[[], int]) -> int:
    """Run a command and report its error. A signal that comes while another is reported is left to the caller."""
    try:
        return action()
    except VillaError as error:
        problem, code = error, error.exit_code
    except Interrupted as interrupted:
        print(f"ended by {interrupted}", flush=True)
        return interrupted.exit_code
    except Exception as error:
        full = no_space(error)
        if full is None:
            raise
        named = getattr(error, "filename", None)
        where = f" in '{named}'" if named else ""
        problem = StorageError(f"{full}{where}; make room, also for temporary files (TMPDIR), and start again")
        code = problem.exit_code
    # Progress bars are gone by now.
    several = isinstance(problem, MissingDataError)
    text = str(problem) if several else "\\n".join(str(problem).splitlines())
    print(f"{name}: error: {text}", file=sys.stderr)
    return code


def show(text: str) -> int:
    """Print a page and return the exit code; a reader that stops early (``| head``) prints no error.

    Raises:
        StorageError: standard output cannot be written.
    """
    sys.stdout.write(text)
    problem = unprinted()
    if problem is None:
        return 0
    if is_broken_pipe(problem):
        return _BROKEN_PIPE
    raise StorageError(f"standard output cannot be written: {problem.strerror}; direct it elsewhere")
