"""Captions of Flickr30k and COCO in Karpathy's splits, for retrieval."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from villa.datasets.raw.example import RawExample, Record, read_records
from villa.errors import DataError

SPLITS = ("train", "restval", "val", "test")
_COCO = re.compile(r"COCO_(train2014|val2014)_(\d{1,12})\.jpg")
_FLICKR = re.compile(r"(\d{1,18})(\.jpg)?")


def read_karpathy(annotations: Path, splits: Collection[str]) -> Iterator[RawExample]:
    """Yield the captions of ``dataset_flickr30k.json`` or ``dataset_coco.json``; an image has about five.

    Args:
        annotations: the file; the form of its file names tells COCO from Flickr30k.
        splits: which of ``SPLITS`` to read.

    Raises:
        DataError: a record lacks a field, or there is no image of these splits.
    """
    found = False
    for image in read_records(annotations, "images"):
        split = image.text("split")
        if split not in SPLITS:
            raise DataError(f"{image.where}: split '{split}' must be {', '.join(SPLITS)}")
        if split not in splits:
            continue
        found = True
        yield from _captions(image)
    if not found:
        raise DataError(f"'{annotations}' has no image of split {' or '.join(splits)}")


def _captions(image: Record) -> Iterator[RawExample]:
    name = _feature_name(image.text("filename"), image.where)
    for sentence in image.records("sentences"):
        texts = {"input_ids": (sentence.text("raw"),)}
        yield RawExample(str(sentence.integer("sentid")), texts, name, dict(sentence.values), sentence.where)


def _feature_name(filename: str, where: str) -> str:
    coco = _COCO.fullmatch(filename)
    return f"coco_{coco[1]}_{int(coco[2]):012}.npz" if coco else flickr_name(filename, where)


def flickr_name(filename: str, where: str) -> str:
    """Return the name of a Flickr30k photograph's feature file, ``flickr30k_000004705552913.npz`` and the like.

    Args:
        filename: ``4705552913.jpg`` or ``4705552913``.
        where: where it was read, for the message.

    Raises:
        DataError: it is named in another way.
    """
    match = _FLICKR.fullmatch(filename)
    if match is None:
        raise DataError(f"{where}: '{filename:.80}' is no name of a Flickr30k or COCO image, like '4705552913.jpg'")
    return f"flickr30k_{int(match[1]):012}.npz"
