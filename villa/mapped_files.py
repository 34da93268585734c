"""Name the damaged file when a read of a memory-mapped file kills the process.

The kernel sends SIGBUS for a read of a missing page (of a truncated file), and LMDB's library aborts (SIGABRT) at a
page that it cannot parse. Neither can become an exception, because the failed read cannot be left; but the handler can
name the file.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from functools import cache
from pathlib import Path
from typing import Any

#: Flags of ``sigaction``: pass the address to the handler, and run it on the alternate stack if there is one.
_SA_SIGINFO, _SA_ONSTACK = 0x4, 0x08000000
#: Offset of the address in ``siginfo_t`` on 64-bit Linux.
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
    """What this process is reading with a library that aborts on a damaged file.

    Attributes:
        path: the file or folder; None if nothing is being read that way.
    """

    path: Path | None = None


@cache
def name_damaged_files() -> None:
    """From now on, end the process with exit code 2 and a line that names the file if a mapped file is damaged.

    Forked child processes inherit this. Does nothing on systems other than 64-bit Linux.
    """
    if sys.platform == "linux" and ctypes.sizeof(ctypes.c_void_p) == 8:
        action = _Action(_HANDLER, flags=_SA_SIGINFO | _SA_ONSTACK)
        for number in (signal.SIGBUS, signal.SIGABRT):
            ctypes.CDLL(None).sigaction(number, ctypes.byref(action), None)


def _end(number: int, told: int, context: Any) -> None:
    # Runs within the failed read; if this returns, the read is repeated and ends the process.
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
