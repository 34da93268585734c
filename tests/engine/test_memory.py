"""What a training run asks of the C library's allocator."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from villa.engine.run import keep_freed_memory

print(keep_freed_memory())
for _ in range(5):
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> tuple[bool, int]:
    """Whether malloc was told to keep memory, and the page faults of 20 tensors of 64 MiB after the first five."""
    without = {key: value for key, value in os.environ.items() if not key.startswith(("VILLA_MALLOC", "MALLOC_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=without | environment, capture_output=True, text=True, check=True
    )
    told, count = done.stdout.split()
    return told == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_that_is_freed_is_used_again_unless_it_is_switched_off() -> None:
    told, few = faults()
    off, many = faults(VILLA_MALLOC="off")
    assert (told, off) == (True, False)
    assert few < many / 3
