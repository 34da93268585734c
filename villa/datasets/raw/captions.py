"""Captions for pre-training (COCO, Visual Genome, Conceptual Captions, SBU), as JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from villa.datasets.raw.example import LineRecords, RawExample

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".npz")


def read_captions(annotations: Path) -> Iterator[RawExample]:
    """Yield captions from lines ``{"id": "1", "image": "coco_train2014_000000000009.jpg", "caption": "a dog"}``.

    The feature file is ``image`` without its folder and with ``.npz`` in place of an image's suffix.

    Raises:
        DataError: a record lacks a field.
    """
    for record in LineRecords(annotations):
        identifier = record.values.get("id")
        number = isinstance(identifier, int) and not isinstance(identifier, bool)
        name = str(identifier) if number else record.text("id")
        texts = {"input_ids": (record.text("caption"),)}
        yield RawExample(name, texts, feature_name(record.text("image")), dict(record.values), record.where)


def feature_name(image: str) -> str:
    """Return the name of an image's feature file: ``a/b.jpg`` gives ``b.npz``."""
    name = PurePosixPath(image).name
    stem, dot, suffix = name.rpartition(".")
    return f"{stem if dot and '.' + suffix.lower() in _IMAGE_SUFFIXES else name}.npz"
