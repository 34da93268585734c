"""Output streams of commands: control characters are escaped, and a stream that fails does not end the run.

It may fail because a reader has gone (``| head``), the disk is full, or the terminal or descriptor is closed.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

#: Characters that act on a terminal or reorder a line instead of being visible; line breaks and tabs stay.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""Return a text with its control characters escaped: ``\x1b``, ``\u202e``."""
    return _HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class Lasting(io.TextIOBase):
    """A text stream that discards what is written after its first failure.

    Characters outside its encoding are escaped.

    Attributes:
        problem: the first failure, or None.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.problem: OSError | None = None

    def write(self, text: str) -> int:
        """Write, or do nothing after a failure."""
        encoding = self.stream.encoding or "utf-8"
        with self._ignoring_failures():
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing after a failure, or if the stream is closed: Python flushes what it finalises."""
        if self.stream.closed:
            return
        with self._ignoring_failures():
            self.stream.flush()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self.stream.isatty()

    def fileno(self) -> int:
        """Return the stream's descriptor."""
        return self.stream.fileno()

    def writable(self) -> bool:
        """Return True."""
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    @contextmanager
    def _ignoring_failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.problem = self.problem or error
            with suppress(OSError):  # buffered text and other writers must not fail either
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)


class Shown(Lasting):
    """A lasting stream that escapes control characters.

    Attributes:
        beneath: the same stream without escaping, for drawing.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.beneath = Lasting(stream)

    def write(self, text: str) -> int:
        """Write, escaping control characters."""
        return super().write(visible(text))


def drawable(stream: TextIO) -> TextIO:
    """Return the stream that passes on the escape sequences of bars and tables."""
    return cast(TextIO, stream.beneath) if isinstance(stream, Shown) else stream


@contextmanager
def lasting() -> Iterator[None]:
    """Make standard output and error ``Shown`` streams. Does nothing within another such block."""
    if isinstance(sys.stdout, Shown):
        yield
        return
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr, sys.__stderr__
    sys.stdout, sys.stderr = (
        cast(TextIO, Shown(stream or open(number, "w", closefd=False)))  # noqa: SIM115 (a descriptor)
        for number, stream in ((1, sys.stdout), (2, sys.stderr))
    )
    if sys.__stderr__ is before[1]:
        sys.__stderr__ = sys.stderr  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr, sys.__stderr__ = before  # type: ignore[misc]


def unprinted() -> OSError | None:
    """Flush standard output; return the error that lost some of it, or None."""
    sys.stdout.flush()
    return sys.stdout.problem if isinstance(sys.stdout, Lasting) else None


def is_broken_pipe(problem: OSError) -> bool:
    """Return whether a reader has stopped early, as it may."""
    return problem.errno == errno.EPIPE


def _open_closed_descriptors() -> None:
    """Open those of descriptors 0 to 2 that are closed: the next file opened would get one and be printed into."""
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            return
        os.set_inheritable(descriptor, True)
