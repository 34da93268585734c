"""What a process says when a file that it has mapped into memory is damaged so that reading it ends the process.

The kernel answers a read of a page that is missing, as where a file was cut short, by SIGBUS, and LMDB's library a page
that it cannot understand by SIGABRT. No exception can be made of them, for the read that failed cannot be left; but
the file can be named.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from functools import cache
from pathlib import Path
from typing import Any

#: Flags of ``sigaction``: the handler is told the address, and has a stack of its own where there is one.
_SA_SIGINFO, _SA_ONSTACK = 0x4, 0x08000000
#: Place of the address in what a handler is told, on 64-bit Linux.
_SI_ADDR = 16
_SIGSET_BYTES = 128

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    """``struct sigaction`` of glibc on 64-bit Linux."""

    _fields_ = (
        ("handler", _Handler),
        ("mask", ctypes.c_byte * _SIGSET_BYTES),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class Reading:
    """What this process reads at the moment by a library that ends it where a file is damaged.

    Attributes:
        path: the file or folder; None where it does nothing of the kind.
    """

    path: Path | None = None


@cache
def name_damaged_files() -> None:
    """From now on, end the process with a line that names the file, and exit code 2, where a mapped file is damaged.

    On other systems than 64-bit Linux nothing is changed. Child processes that are forked inherit it.
    """
    if sys.platform == "linux" and ctypes.sizeof(ctypes.c_void_p) == 8:
        action = _Action(_HANDLER, flags=_SA_SIGINFO | _SA_ONSTACK)
        for number in (signal.SIGBUS, signal.SIGABRT):
            ctypes.CDLL(None).sigaction(number, ctypes.byref(action), None)


def _end(number: int, told: int, context: Any) -> None:
    # Runs within the read that failed, which is repeated, and ends the process, if this returns.
    ctypes.CDLL(None).signal(number, 0)
    if number == signal.SIGBUS:
        name = _mapped_at(ctypes.c_uint64.from_address(told + _SI_ADDR).value)
        problem = f"a part of '{name}' is missing: it is damaged, or was cut short while it was being read"
    else:
        name = None if Reading.path is None else str(Reading.path)
        problem = f"'{name}' is damaged"
    if name is not None:
        line = f"villa: error: {problem}; copy or download it again\n"
        os.write(2, line.encode(errors="backslashreplace"))
        os._exit(2)


_HANDLER = _Handler(_end)


def _mapped_at(address: int) -> str | None:
    """Return the file that is mapped at an address."""
    with Path("/proc/self/maps").open(errors="surrogateescape") as maps:
        for line in maps:
            bounds, *_, name = line.rstrip("\n").split(maxsplit=5)
            begin, end = (int(bound, 16) for bound in bounds.split("-"))
            if begin <= address < end and name.startswith("/"):
                return name
    return None
