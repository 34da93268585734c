"""Collation of examples into a right-padded batch, with reuse of large buffers."""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from villa.batch import Batch
from villa.datasets.base import Example, Ragged
from villa.errors import DataError

#: Smallest size in bytes of a reused buffer; the allocator recycles smaller ones itself.
LARGE = 1 << 22
#: Number of free buffers to keep.
KEPT = 2

_free: deque[mmap.mmap] = deque(maxlen=KEPT)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor, like ``torch.empty``.

    A batch of region features takes tens of megabytes. The allocator returns memory of that size to the system after
    every batch, and allocating it again, page by page, takes several times as long as filling it. Here it is kept for
    the next batch once no tensor uses it, and lies on huge pages if available.

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
    """Return a free buffer that is large enough, but not twice as large as needed, or a new one."""
    for _ in range(KEPT):
        try:
            memory = _free.pop()  # the last one, in cache at best; atomic: other threads may free tensors
        except IndexError:
            break
        if size <= len(memory) <= 2 * size:
            return memory
        _free.appendleft(memory)
    # A little more than needed, as the next batch may be larger.
    memory = mmap.mmap(-1, -(-size * 5 // 4 // LARGE) * LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class _Slots(threading.local):
    """The places of region features in the batch that this thread reads."""

    def __init__(self) -> None:
        self.clear()

    def clear(self, lengths: Sequence[int] = ()) -> None:
        """Plan for images with these numbers of regions."""
        self.lengths, self.taken = lengths, 0
        self.padded: Tensor | None = None
        self.places: Sequence[Tensor] = ()

    def take(self, length: int, width: int) -> Tensor | None:
        """Return the next place ``[R, D]``, unless an image of another size was expected there."""
        place, self.taken = self.taken, self.taken + 1
        if place >= len(self.lengths) or self.lengths[place] != length:
            return None
        if self.padded is None:
            self.padded = empty(len(self.lengths), max(self.lengths), width, dtype=torch.float32)
            self.places = self.padded.unbind()
        return self.places[place][:length] if self.padded.shape[2] == width else None

    def filled(self, rows: Sequence[Tensor]) -> Tensor | None:
        """Return the buffer if each row lies in its place, and nothing else."""
        padded = self.padded
        if padded is None or rows[0].data_ptr() != padded.data_ptr() or len(rows) != len(padded):
            return None
        for row, length, place in zip(rows, self.lengths, self.places, strict=True):
            own = row.data_ptr() == place.data_ptr() and row.dtype == padded.dtype and row.is_contiguous()
            if not own or row.shape != (length, *place.shape[1:]):
                return None
        return padded


_slots = _Slots()


@contextlib.contextmanager
def reading(lengths: Sequence[int]) -> Iterator[None]:
    """Let ``placed`` copy features straight to where ``collate`` would, while a batch is read and collated.

    Args:
        lengths: numbers of regions of the images of the batch, in order; features of any other image are copied twice.
    """
    _slots.clear(lengths)
    try:
        yield
    finally:
        _slots.clear()


def placed(features: npt.NDArray[np.floating[Any]]) -> Tensor:
    """Copy the features ``[R, D]`` of an image out of a file's memory.

    Returns:
        A tensor of their type or, while a batch is read, one of type float32 within that batch.
    """
    place = _slots.take(*features.shape) if _slots.lengths else None
    if place is None:
        return torch.from_numpy(features if features.flags.writeable else np.array(features))
    return place.copy_(torch.from_numpy(np.asarray(_Readable(features))))


class _Readable:
    """An array that torch does not warn about; it is only read."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array, self.__array_interface__ = array, array.__array_interface__
        self.__array_interface__["data"] = (self.__array_interface__["data"][0], False)


T = TypeVar("T")


def collate(examples: Sequence[Example]) -> Batch:
    """Pad examples into a batch.

    Args:
        examples: at least one, all of the same form: the same number of rows; all or none with types, regions, targets.

    Returns:
        A batch with ``input_ids [B, (C,) T]`` int64, ``features [B, (I,) R, D]`` float32, bool masks, and
        ``targets`` int64 ``[B]`` (or ``[B, C]``) or float32 ``[B, labels]``.

    Raises:
        DataError: the examples are of different forms.
    """
    ids = [example.id for example in examples]
    texts = [example.input_ids for example in examples if example.input_ids is not None]
    types: list[Ragged] | None = _all_or_none([e.token_type_ids for e in examples], "token_type_ids", ids)
    features: list[Ragged] | None = _all_or_none([e.features for e in examples], "features", ids)
    boxes: list[Ragged] | None = _all_or_none([e.boxes for e in examples], "boxes", ids)
    references = [example.reference for example in examples]
    return Batch(
        ids=ids,
        input_ids=_pad(texts, torch.int64, ids),
        attention_mask=_mask(texts, ids),
        token_type_ids=None if types is None else _pad(types, torch.int64, ids),
        features=None if features is None else _pad(features, torch.float32, ids),
        boxes=None if boxes is None else _pad(boxes, torch.float32, ids),
        region_mask=None if features is None else _mask(features, ids),
        targets=stack_targets(examples),
        references=None if all(reference is None for reference in references) else references,
    )


def _pad(values: Sequence[Ragged], dtype: torch.dtype, ids: list[str]) -> Tensor:
    """Stack the rows of all examples, zero-padded at the end of the first dimension, in one pass over the data."""
    rows, per_example = _rows(values, ids)
    widths = {row.shape[1:] for row in rows}
    if len(widths) > 1:
        raise DataError(f"a batch mixes rows of width {' and '.join(str(list(w)) for w in widths)} (first: '{ids[0]}')")
    padded = _padded(rows, dtype)
    return padded if per_example is None else padded.view(-1, per_example, *padded.shape[1:])


def _padded(rows: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Stack rows, zero-padded at the end of the first dimension."""
    lengths = [row.shape[0] for row in rows]
    filled = _slots.filled(rows)
    size = len(rows) * max(lengths) * rows[0].shape[1:].numel() * dtype.itemsize
    if filled is None and size < LARGE and all(row.dtype == dtype for row in rows):
        small = np.zeros((len(rows), max(lengths), *rows[0].shape[1:]), rows[0].numpy().dtype)
        for place, row, length in zip(small, rows, lengths, strict=True):
            place[:length] = row.numpy()  # with less ado than torch
        return torch.from_numpy(small)
    padded = empty(len(rows), max(lengths), *rows[0].shape[1:], dtype=dtype) if filled is None else filled
    if filled is None:
        for target, row, length in zip(padded.unbind(), rows, lengths, strict=True):
            target[:length] = row
    # Only the padding is zeroed: everything else is written anyway. Filling bytes need not read the memory first.
    for place, length in zip(padded.view(torch.uint8).numpy(), lengths, strict=True):
        place[length:].fill(0)
    return padded


def _mask(values: Sequence[Ragged], ids: list[str]) -> Tensor:
    rows, per_example = _rows(values, ids)
    lengths = torch.tensor([row.shape[0] for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return mask if per_example is None else mask.view(-1, per_example, mask.shape[-1])


def _rows(values: Sequence[Ragged], ids: list[str]) -> tuple[list[Tensor], int | None]:
    """Return the rows of all examples, and their number per example (None if each is a plain tensor)."""
    counts = {len(value) if isinstance(value, tuple) else None for value in values}
    if len(counts) > 1:
        named = " and ".join("one" if count is None else str(count) for count in counts)
        raise DataError(f"a batch mixes examples of {named} rows (first: '{ids[0]}'); keep them apart")
    rows = [row for value in values for row in (value if isinstance(value, tuple) else (value,))]
    return rows, counts.pop()


def _all_or_none(values: Sequence[T | None], name: str, ids: list[str]) -> list[T] | None:
    present = [value for value in values if value is not None]
    if 0 < len(present) < len(values):
        first = next(i for i, value in zip(ids, values, strict=True) if value is None)
        raise DataError(f"a batch mixes examples with and without {name} (without: '{first}'); keep them apart")
    return present or None


def stack_targets(examples: Sequence[Example]) -> Tensor | None:
    """Return the targets of examples: int64 ``[B]`` or ``[B, C]``, float32 ``[B, labels]``, or None.

    Raises:
        DataError: they have different forms, or only some examples have one.
    """
    targets, ids = [example.target for example in examples], [example.id for example in examples]
    if all(isinstance(target, int) for target in targets):
        return torch.tensor(targets)
    tensors = [torch.tensor(target) if isinstance(target, int) else target for target in targets]
    present = _all_or_none(tensors, "targets", ids)
    if present is None:
        return None
    if len({tensor.shape for tensor in present}) > 1:
        raise DataError(f"a batch mixes class and soft targets (first: '{ids[0]}'); use one form in a data set")
    stacked = torch.stack(present)
    return stacked.float() if stacked.is_floating_point() else stacked
