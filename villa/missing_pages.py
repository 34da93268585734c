"""What a process says when a file that it has mapped into memory lacks pages: it was cut short, or is damaged.

The kernel answers a read of such a page by SIGBUS, which ends the process without a word. No exception can be made of
it, for the read that failed cannot be left; but the file can be named.
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


@cache
def name_file_on_missing_page() -> None:
    """From now on, end the process with a line that names the file, and exit code 2, where a mapped page is missing.

    On other systems than 64-bit Linux nothing is changed. Child processes that are forked inherit it.
    """
    if sys.platform == "linux" and ctypes.sizeof(ctypes.c_void_p) == 8:
        action = _Action(_HANDLER, flags=_SA_SIGINFO | _SA_ONSTACK)
        ctypes.CDLL(None).sigaction(signal.SIGBUS, ctypes.byref(action), None)


def _end(number: int, told: int, context: Any) -> None:
    # Runs within the read that failed, which is repeated, and ends the process, if this returns.
    ctypes.CDLL(None).signal(number, 0)
    name = _mapped_at(ctypes.c_uint64.from_address(told + _SI_ADDR).value)
    if name is not None:
        problem = "it is damaged, or was cut short while it was being read; copy or download it again"
        os.write(2, f"villa: error: a part of '{name}' is missing: {problem}\n".encode(errors="backslashreplace"))
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
