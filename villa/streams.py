"""What a command prints: control characters are shown, and a stream that takes no more stops nothing.

A reader that has gone (``| head``), a full disk, a closed terminal or descriptor: none is a reason for a run to end.
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

#: What would act on a terminal or reorder a line instead of being seen; line breaks and tabs stay.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""Return a text whose control characters are written as escapes: ``\x1b``, ``\u202e``."""
    return _HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class Lasting(io.TextIOBase):
    """Writes to a text stream for as long as it takes something; from its first failure on, what is written is lost.

    Characters that its encoding does not have are written as escapes.

    Args:
        stream: the stream.

    Attributes:
        problem: why nothing is written any more, or None.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.problem: OSError | None = None

    def write(self, text: str) -> int:
        """Write, or do nothing."""
        encoding = self.stream.encoding or "utf-8"
        with self._kept_going():
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing."""
        with self._kept_going():
            self.stream.flush()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
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
    def _kept_going(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.problem = self.problem or error
            with suppress(OSError):  # what is buffered, and what others write there, must not fail either
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)


class Shown(Lasting):
    """A lasting stream that shows control characters.

    Args:
        stream: the stream.

    Attributes:
        beneath: the same without that, for what draws.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.beneath = Lasting(stream)

    def write(self, text: str) -> int:
        """Write, with control characters as escapes."""
        return super().write(visible(text))


def drawable(stream: TextIO) -> TextIO:
    """Return what takes the escape sequences of bars and tables for a stream."""
    return cast(TextIO, stream.beneath) if isinstance(stream, Shown) else stream


@contextmanager
def lasting() -> Iterator[None]:
    """Let standard output and error be ``Shown`` streams; within another such block it changes nothing."""
    if isinstance(sys.stdout, Shown):
        yield
        return
    _hold_descriptors()
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
    """Return why not all of what was written to standard output was taken, or None."""
    sys.stdout.flush()
    return sys.stdout.problem if isinstance(sys.stdout, Lasting) else None


def is_broken_pipe(problem: OSError) -> bool:
    """Whether it is a reader that has stopped early, which is its right."""
    return problem.errno == errno.EPIPE


def _hold_descriptors() -> None:
    """Open what is closed of descriptors 0 to 2: the next file to be opened would be printed into."""
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            return
        os.set_inheritable(descriptor, True)
