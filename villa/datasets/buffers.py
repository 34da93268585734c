"""Memory for batches, used again when a batch is gone."""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections import deque

import torch
from torch import Tensor

#: Bytes from which on a tensor gets memory from here; smaller ones are recycled by the allocator itself.
LARGE = 1 << 22
#: Buffers without a tensor that are kept for the next batch.
KEPT = 2

_free: deque[mmap.mmap] = deque(maxlen=KEPT)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor of arbitrary contents, as ``torch.empty`` does.

    A batch of region features has tens of megabytes. The allocator gives memory of that size back to the system
    after every batch, and getting it anew, page by page, takes several times as long as filling it. Here it lies on
    huge pages where there are any, and is kept for the next batch when the last tensor that uses it is gone.

    Args:
        shape: sizes of the dimensions.
        dtype: type of the elements.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = _take(size)
    view = memoryview(memory)  # what the tensor holds on to
    weakref.finalize(view, _free.append, memory).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=math.prod(shape)).view(shape)


def _take(size: int) -> mmap.mmap:
    """Return a kept buffer that is large enough and not twice as large as needed, or a new one."""
    for _ in range(KEPT):
        try:
            memory = _free.popleft()  # atomic: tensors may die in other threads
        except IndexError:
            break
        if size <= len(memory) <= 2 * size:
            return memory
        _free.append(memory)
    # A little more than needed: the next batch has another size.
    memory = mmap.mmap(-1, -(-size * 5 // 4 // LARGE) * LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
