"""Errors that the user can mend: each is shown as one line, with exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class VillaError(Exception):
    """A mistake in the input. The message is one line: what was given, what is allowed, what to do."""

    exit_code = 2

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(VillaError):
    """A recipe or an override cannot be used."""


class DataError(VillaError):
    """A data set, feature file or example cannot be used."""


class MissingDataError(DataError):
    """Data that a recipe needs is missing. The message has one line for each missing item."""


class CheckpointError(VillaError):
    """A checkpoint is missing, corrupt or does not fit the model."""


class StorageError(VillaError, OSError):
    """A file cannot be written: the disk is full, or the folder is gone. Also an ``OSError``."""


class NonFiniteError(VillaError):
    """A loss or a gradient became NaN or infinite, and the run was told to stop."""


class ConnectionLostError(VillaError):
    """Another process of the run ended or cannot be reached."""

    exit_code = 1


@contextmanager
def about(what: str) -> Iterator[None]:
    """Prefix the message of a ``VillaError`` with the stage, run or part that it is about."""
    try:
        yield
    except VillaError as error:
        raise type(error)(f"{what}: {error}") from error


def one_line(error: BaseException) -> str:
    """Return ``TypeName: first line of the message``."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


@contextmanager
def reading(problem: str, advice: str, kind: type[VillaError] = DataError) -> Iterator[None]:
    """Turn whatever is raised while a file is read into one error of one line.

    Libraries raise all kinds of errors for unexpected content (a panic in Rust is not even an ``Exception``). Only
    ``VillaError``, signals and the end of the process pass.

    Args:
        problem: what failed: ``"'model.safetensors' cannot be read"``.
        advice: what to do.
        kind: class of the error.
    """
    try:
        yield
    except (VillaError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise kind(f"{problem}: {one_line(error)}; {advice}") from error


def nearest(name: str, allowed: Iterable[str], least: float = 0.6) -> str:
    """Suggest the closest allowed name: ``"; did you mean 'x'?"``, or an empty string.

    Args:
        name: what was given.
        allowed: what is allowed.
        least: least similarity of a suggestion, in [0, 1].
    """
    match = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1, cutoff=least)
    return f"; did you mean '{match[0]}'?" if match else ""
