"""From raw examples to a text database."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from villa.datasets.raw.example import RawExample, Words, read_object
from villa.datasets.raw.word_pieces import WordPieces
from villa.datasets.stores.lmdb_filling import JOURNAL
from villa.datasets.stores.writers import TextDatabaseWriter
from villa.engine.progress import Mode, track
from villa.errors import DataError
from villa.files import atomic_write

#: Word-piece ids of an example by field.
Ids = Mapping[str, Any]


@dataclass(frozen=True)
class TextSource:
    """What a text database is made of.

    Attributes:
        examples: read once, in the order of the data set.
        total: how many there are, for the display, if that is known.
        lengths: what ``id2len.json`` (or ``id2len_<kind>.json``) holds for an example's ids.
        files: contents of JSON files beside the database, by name without suffix.
        texts_of_images: write ``img2txts.json`` too.
        drop_empty: leave out texts without a word-piece.
    """

    examples: Iterable[RawExample]
    total: int | None = None
    lengths: Callable[[Ids], int | dict[str, int]] = lambda ids: len(ids["input_ids"])
    files: Mapping[str, Any] = field(default_factory=dict)
    texts_of_images: bool = False
    drop_empty: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a conversion did.

    Attributes:
        entries: examples or images in the database.
        present: how many of them were there before.
        left_out: examples that were left out.
    """

    entries: int
    present: int
    left_out: int = 0


def finished_text_database(path: Path, meta: Mapping[str, Any]) -> bool:
    """Say whether there is a finished database with this ``meta.json``.

    Raises:
        DataError: there is one that was made in another way.
    """
    if (path / JOURNAL).exists() or not (path / "meta.json").exists():
        return False
    present = read_object(path / "meta.json").values
    other = [key for key in (*meta, *present) if meta.get(key) != present.get(key)]
    if other:
        given, there = (json.dumps(values.get(other[0]))[:120] for values in (meta, present))
        raise DataError(
            f"'{path}' holds a finished database made with another {other[0]} ({there}, now {given}); give another "
            "--output, or remove it"
        )
    return True


def write_text_database(
    path: Path,
    source: TextSource,
    pieces: WordPieces,
    meta: Mapping[str, Any],
    *,
    missing: frozenset[str] = frozenset(),
    progress: Mode = "auto",
) -> Outcome:
    """Tokenise examples into a text database, or go on with an unfinished one.

    Args:
        path: its folder.
        source: what to write.
        pieces: the tokenizer.
        meta: contents of ``meta.json``.
        missing: names of feature files that do not exist: examples about them are left out.
        progress: how to show how far it is.

    Raises:
        DataError: an example cannot be used, two have the same id, or the database was begun in another way.
    """
    seen: set[str] = set()
    with TextDatabaseWriter(path, meta, texts_of_images=source.texts_of_images) as writer:
        present = len(writer)
        for example in track(source.examples, f"write {path.name}", source.total, mode=progress):
            if example.id in seen:
                raise DataError(f"{example.where}: the id '{example.id}' occurs twice; ids must be unique")
            seen.add(example.id)
            if not writer.has(example.id) and missing.isdisjoint(_images(example)):
                _add(writer, example, source, pieces)
        if not len(writer):
            raise DataError(f"no example is left for '{path}'; check the files given")
        pieces.save(path)
        for name, value in source.files.items():
            atomic_write(path / f"{name}.json", json.dumps(value, ensure_ascii=False))
        return Outcome(len(writer), present, left_out=len(seen) - len(writer))


def _add(writer: TextDatabaseWriter, example: RawExample, source: TextSource, pieces: WordPieces) -> None:
    ids = {name: _encode(text, pieces) for name, text in example.texts.items()}
    if source.drop_empty and not all(ids.values()):
        return
    images = {} if example.images is None else {"img_fname": example.images}
    try:
        writer.add(example.id, {**example.fields, **images, **ids}, source.lengths(ids), example.images)
    except (OverflowError, ValueError, TypeError, UnicodeEncodeError) as error:
        raise DataError(f"{example.where}: cannot be stored ({error}); mend its numbers and texts") from error


def _encode(text: Words | list[Words], pieces: WordPieces) -> list[Any]:
    if isinstance(text, tuple):
        return pieces.encode(text)
    return [pieces.encode(words) for words in text]


def _images(example: RawExample) -> list[str]:
    images = example.images or []
    return [images] if isinstance(images, str) else images
