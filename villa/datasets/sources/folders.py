"""Folders of images: with the classes as folders, captions beside the images, a table of them, or nothing else."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from villa.datasets.own.pictures import SUFFIXES
from villa.datasets.sources.fields import Columns
from villa.datasets.sources.unpacked import NAME, Part, Row
from villa.errors import DataError, reading
from villa.files import read_text

#: Names of splits, of which none is a class.
SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "valid", "dev"), "test": ("test",)}
#: Question about the images of classes, unless another is given.
QUESTION = "What is it?"
_CAPTION = ".txt"
_TAKEN = {*SUFFIXES, _CAPTION}


def image_folder(folder: Path) -> Part:
    """Return the images of a folder and those below it, in the order of their names.

    With a text of an image's name beside it, these are captions; otherwise the images in folders are of the classes
    that these are called after, and images beside each other of no class.

    Raises:
        DataError: there is no image, or the folders are those of splits.
    """
    digest, captions, classes, loose = hashlib.blake2b(digest_size=16), False, set[str](), ""
    for name in _walk(folder):
        path = folder / name
        if path.suffix == _CAPTION:
            stat = path.stat()
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
            continue
        digest.update(f"{name}\n".encode("utf-8", "surrogateescape"))
        captions = captions or path.with_suffix(_CAPTION).is_file()
        top, below, _ = name.partition("/")
        if below:
            classes.add(top)
        else:
            loose = loose or name
    if not classes and not loose:
        raise DataError(
            f"the folder '{folder}' holds no file that is read; give one with images, or with files of one kind: "
            "parquet, CSV, TSV, Arrow, JSON lines, tar"
        )
    if classes and not captions:
        _check_classes(folder, classes, loose)
    labelled = bool(classes) and not captions
    return Part(
        str(folder), folder, [digest.hexdigest(), captions], lambda columns: _rows(folder, columns, captions, labelled)
    )


def _check_classes(folder: Path, classes: set[str], loose: str) -> None:
    splits = {name for names in SPLIT_NAMES.values() for name in names}
    if classes <= splits:
        raise DataError(
            f"'{folder}' holds the splits {', '.join(sorted(classes))}; give one of these folders, or all by "
            f"dataset.source={folder}"
        )
    if loose:
        shown = ", ".join(sorted(classes)[:4])
        raise DataError(f"'{folder / loose}' lies beside the folders of classes ({shown}); move it into one")


def _rows(folder: Path, columns: Columns, captions: bool, labelled: bool) -> Iterator[Row]:
    number = 0
    for name in _walk(folder):
        if name.endswith(_CAPTION):
            continue
        number += 1
        fields = {NAME: name, "image": name}
        if captions:
            fields["text"] = _caption((folder / name).with_suffix(_CAPTION), name)
        elif columns.question is None:
            fields["question"] = QUESTION
        if labelled:
            fields["answer"] = name.partition("/")[0]
        yield number, fields if columns.images else {key: fields[key] for key in fields if key != "image"}


def _caption(path: Path, image: str) -> str:
    if not path.is_file():
        raise DataError(f"the image '{image}' has no caption; write it to '{path}'")
    text = " ".join(read_text(path, "caption", "write a line of text").split())
    if not text:
        raise DataError(f"the caption '{path}' is empty; write a line of text")
    return text


def _walk(folder: Path, below: str = "") -> Iterator[str]:
    """Yield the relative names of the images and texts, folder by folder in the order of their names."""
    with reading(f"the folder '{folder / below}' cannot be read", "mend the path"), os.scandir(folder / below) as found:
        entries = sorted((entry.name, entry.is_dir()) for entry in found if not entry.name.startswith("."))
    for name, is_folder in entries:
        if is_folder:
            yield from _walk(folder, f"{below}{name}/")
        elif os.path.splitext(name)[1].lower() in _TAKEN:  # noqa: PTH122 (much faster)
            yield below + name
