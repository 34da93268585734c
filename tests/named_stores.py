"""The stores of the released databases read by name, for what the tests know by name."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from villa.datasets.uniter.image_lmdb import ImageStore, PairedImageStore
from villa.datasets.uniter.index import Names
from villa.datasets.uniter.text_lmdb import TextStore


def lengths_of(store: TextStore, kind: str = "") -> dict[str, int]:
    """The number of word-pieces of every example by id, in the order of the list."""
    listed = store.of_kind(kind)
    return dict(zip(listed.ids, listed.lengths.tolist(), strict=True))


def images_of(store: TextStore) -> dict[str, str | list[str]]:
    """The name of the image, or names of the images, of every example by id."""
    named = store.named_images()
    names, found = iter(named.names.to_pylist()), {}
    for id, size, listed in zip(named.texts.to_pylist(), named.sizes.tolist(), named.listed.tolist(), strict=True):
        own = [next(names) for _ in range(size)]
        found[id] = own if listed else own[0]
    return found


def read_text(store: TextStore, id: str, kind: str = "") -> dict[str, Any]:
    """Read an example by id."""
    listed = store.of_kind(kind)
    return listed[_row(listed.ids, id)]


def read_image(store: ImageStore, name: str) -> tuple[Tensor, Tensor]:
    """Read an image by name."""
    return store[row_of(store, name)]


def row_of(store: ImageStore, name: str) -> int:
    """The row of an image."""
    return _row(store.names, name)


def _row(names: Names, name: str) -> int:
    if names.rows is None and names.column.type == pa.string():
        row: int = pc.index(names.column, name).as_py()  # a sequence's own search takes a second for 10,000 names
        if row >= 0:
            return row
    return names.index(name)


def rows_of(store: PairedImageStore, names: Sequence[str]) -> tuple[int, int]:
    """The rows of an image in both databases."""
    return row_of(store.ground_truth, names[0]), row_of(store.detected, names[1])
