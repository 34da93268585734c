"""Flickr30k Entities in its released form: captions whose phrases are linked to boxes (Plummer et al., ICCV 2015)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from villa.datasets.linked.example import Box, Link, Linked
from villa.errors import DataError, about, one_line
from villa.files import lines_of, read_text

#: Beginning of a phrase: the number of its chain, and the types of what it names.
_OPENING = re.compile(r"\[/EN#(\d+)((?:/[^/\s\]]+)+)")
#: Chain of phrases that are not in the picture.
_NOT_VISUAL = "0"
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class Phrase(NamedTuple):
    """A phrase of a caption.

    Attributes:
        span: its characters in the caption.
        first_word: number of its first word.
        chain: number of its chain.
        types: types of the chain.
    """

    span: tuple[int, int]
    first_word: int
    chain: str
    types: tuple[str, ...]


class Annotation(NamedTuple):
    """What a picture shows.

    Attributes:
        size: width and height.
        boxes: boxes by chain, 0-based.
    """

    size: tuple[float, float]
    boxes: Mapping[str, tuple[Box, ...]]


def read(folder: Path, split: str | None) -> Iterator[Linked]:
    """Yield the captions of a folder with ``Sentences``, ``Annotations`` and, for splits, ``<split>.txt``.

    Captions without a linked phrase are left out.

    Raises:
        DataError: a file is missing or damaged; the message names it, and the line.
    """
    sentences, annotations = (_below(folder, name) for name in ("Sentences", "Annotations"))
    for name in _ids(folder, sentences, annotations, split):
        annotation = read_annotation(annotations / f"{name}.xml")
        path = sentences / f"{name}.txt"
        for number, line in enumerate(lines_of(read_text(path, "captions file"))):
            if not line.strip():
                continue
            where = f"{path}:{number + 1}"
            with about(where):
                text, phrases = parse_caption(line)
            known = ((phrase, annotation.boxes.get(phrase.chain, ())) for phrase in phrases)
            links = tuple(Link(phrase.span, boxes, phrase.types) for phrase, boxes in known if boxes)
            if links:
                yield Linked(f"{name}#{number}", name, text, links, size=annotation.size, where=where)


def parse_caption(line: str) -> tuple[str, list[Phrase]]:
    """Return a caption without its marks, and its phrases; a mark need not begin a word, and empty phrases are none.

    Raises:
        DataError: a mark is damaged, a phrase is not closed, or one is within another.
    """
    words: list[str] = []
    phrases: list[Phrase] = []
    opened: tuple[int, int, re.Match[str]] | None = None
    for token in line.replace("[/EN#", " [/EN#").split():
        if token.startswith("[/EN#"):
            mark = _OPENING.fullmatch(token)
            if mark is None or opened is not None:
                problem = "is within another phrase" if mark else "is no mark like [/EN#11/people"
                raise DataError(f"'{token:.40}' {problem}; take another copy of the annotations")
            opened = _length(words), len(words), mark
            continue
        closes = opened is not None and token.endswith("]")
        word = token[:-1] if closes else token
        words += [word] if word else []
        if closes and opened is not None:
            start, first, mark = opened
            types = tuple(mark[2].strip("/").split("/"))
            if first < len(words):
                phrases.append(Phrase((start, _length(words) - 1), first, mark[1], types))
            opened = None
    if opened is not None:
        raise DataError(f"the phrase '{opened[2][0]} ...' is not closed by a ]; take another copy of the annotations")
    return " ".join(words), phrases


def _length(words: Sequence[str]) -> int:
    """Return the number of characters of words with a space behind each."""
    return sum(map(len, words)) + len(words)


def read_annotation(path: Path) -> Annotation:
    """Read the boxes of a picture; the file's are 1-based.

    Raises:
        DataError: the file is missing or damaged.
    """
    text = read_text(path, "annotation")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DataError(f"the annotation '{path}' declares entities, which no released one does; it is not read")
    try:
        root = ElementTree.fromstring(text)  # noqa: S314 (no entities)
        size = _number(root, "size/width"), _number(root, "size/height")
        if min(size) <= 0:
            raise ValueError(f"the size of the picture is {size[0]:g} x {size[1]:g}")
        boxes: dict[str, list[Box]] = {}
        for entry in root.findall("object"):
            box = entry.find("bndbox")
            if box is None:
                continue
            x1, y1, x2, y2 = (_number(box, name) - 1 for name in _CORNERS)
            if x2 < x1 or y2 < y1:
                raise ValueError(f"the box {x1:g}, {y1:g}, {x2:g}, {y2:g} is turned around")
            for chain in entry.findall("name"):
                boxes.setdefault((chain.text or "").strip(), []).append((x1, y1, x2, y2))
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"the annotation '{path}' is damaged ({one_line(error)}); take another copy") from error
    found = {chain: tuple(its) for chain, its in boxes.items() if chain != _NOT_VISUAL}
    return Annotation(size, found)


def _number(element: ElementTree.Element, path: str) -> float:
    found = element.findtext(path)
    if found is None:
        raise ValueError(f"<{element.tag}> has no <{path}>")
    if not math.isfinite(value := float(found)):
        raise ValueError(f"<{path}> is {found.strip():.40}, which is no number of pixels")
    return value


def _below(folder: Path, name: str) -> Path:
    """Return a folder of the release, or the folder itself if all files lie in it."""
    return folder / name if (folder / name).is_dir() else folder


def _ids(folder: Path, sentences: Path, annotations: Path, split: str | None) -> list[str]:
    """Return the names of the pictures of a split, or of all that have captions."""
    if split is not None:
        lines = lines_of(read_text(folder / f"{split}.txt", "list of pictures", "give probe.split, or leave it out"))
        return [line.strip() for line in lines if line.strip()]
    names = {path.stem for path in sentences.glob("*.txt")}
    if sentences == annotations:  # which may hold lists of pictures, too
        names &= {path.stem for path in annotations.glob("*.xml")}
    if not names:
        raise DataError(
            f"'{folder}' holds no captions; give the folder of Flickr30k Entities, with Sentences/<id>.txt and "
            "Annotations/<id>.xml"
        )
    return sorted(names, key=lambda name: (len(name), name))
