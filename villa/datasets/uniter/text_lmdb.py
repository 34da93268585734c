"""Text databases in the format of UNITER and VILLA: an LMDB environment of examples beside JSON files.

Values are ``lz4.frame``-compressed msgpack maps; ``id2len.json`` lists the examples in the order of the data set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import lz4.frame
import msgpack
import numpy as np
from tokenizers import Tokenizer

from villa.datasets.checksums import SUFFIX, check_sizes
from villa.datasets.text import TOKENIZER_FILE, load_tokenizer
from villa.datasets.uniter.image_names import ImageNames
from villa.datasets.uniter.lmdb_env import LmdbReader
from villa.datasets.uniter.strings import Strings
from villa.datasets.uniter.tables import (
    UNREADABLE,
    NamesOfTexts,
    NotAnObjectError,
    Numbers,
    WrongEntryError,
    read_names,
    read_numbers,
)
from villa.errors import DataError
from villa.files import regular_file
from villa.json_values import parse_json
from villa.plugins import one_line

#: Largest example after decompression, in bytes: damaged or hostile values claim more.
MAX_EXAMPLE_BYTES = 1 << 26
#: What the package writes beside the databases that it makes.
CHECKSUMS = f"db{SUFFIX}"
#: Word-pieces that VCR has beyond its tokenizer's: names of objects.
_EXTRA_WORDS = 81


class TextDatabase:
    """The examples of one split, read by id.

    Args:
        path: the folder (``vqa_train.db``).
        subset: use the examples listed in ``id2len.<subset>.json`` instead of ``id2len.json``.

    Attributes:
        path: the folder.
        meta: contents of ``meta.json``.

    Raises:
        DataError: the folder is not a text database.
    """

    def __init__(self, path: Path, subset: str | None = None) -> None:
        self.path = path
        self.subset = subset
        if not path.is_dir():
            raise DataError(
                f"text database '{path}' is not a folder; give one with data.mdb, meta.json and id2len.json"
            )
        check_sizes(path / CHECKSUMS)
        self._reader = LmdbReader(path)
        self.meta: Mapping[str, Any] = self._read_object("meta.json")
        check_meta(self.meta, f"'{path / 'meta.json'}'")

    @property
    def cls_id(self) -> int:
        """Id of [CLS]."""
        return int(self.meta["CLS"])

    @property
    def sep_id(self) -> int:
        """Id of [SEP]."""
        return int(self.meta["SEP"])

    @property
    def mask_id(self) -> int:
        """Id of [MASK]."""
        return int(self.meta["MASK"])

    @property
    def vocab_size(self) -> int:
        """Number of word-pieces: the end of ``v_range``."""
        return int(self.meta["v_range"][1])

    @property
    def tokenizer(self) -> str | None:
        """Name of the tokenizer that made the ids, if the database says so."""
        return next((self.meta[key] for key in ("bert", "toker", "tokenizer") if key in self.meta), None)

    @cached_property
    def vocabulary(self) -> Tokenizer | None:
        """The tokenizer that made the ids, if it lies in the folder, as `tools/make_text_db.py` puts it there."""
        file = self.path / TOKENIZER_FILE
        return load_tokenizer(file) if file.is_file() else None

    def lengths(self, kind: str = "") -> Numbers:
        """Read the number of word-pieces (without [CLS] and [SEP]) of every example, in the order of the data set.

        Args:
            kind: ``""``, or ``qa`` or ``qar`` for the two tasks of VCR.

        Raises:
            DataError: the file is missing or holds something else.
        """
        path = self.path / self.lengths_file(kind)
        try:
            return read_numbers(path, 0)
        except WrongEntryError as wrong:
            raise DataError(f"'{path}': the length of '{wrong.name}' is {wrong.value!r:.40}, not a number") from wrong
        except UNREADABLE as error:
            raise self._unreadable(path.name, error) from error

    @cached_property
    def images(self) -> NamesOfTexts:
        """Image file name, or names, of every example (``txt2img.json``)."""
        path = self.path / "txt2img.json"
        try:
            return read_names(path)
        except WrongEntryError as wrong:
            given = f"{wrong.value!r:.40}"
            raise DataError(f"'{path}': '{wrong.name}' has {given}, not one or several file names") from wrong
        except UNREADABLE as error:
            raise self._unreadable(path.name, error) from error

    def images_of(self, ids: Strings) -> ImageNames:
        """Return the image or images of examples.

        Raises:
            DataError: one has none; or ``txt2img.json`` cannot be used.
        """
        rows = self.images.rows(ids)
        if len(rows) and rows.min() < 0:
            missing = ids[int(rows.argmin())]
            raise DataError(f"text database '{self.path}': txt2img.json lacks the example '{missing}'")
        return self.images.names.take(rows)

    @cached_property
    def texts_of_images(self) -> Mapping[str, list[str]]:
        """Ids of the texts about every image (``img2txts.json``; retrieval only)."""
        texts = self._read_object("img2txts.json")
        wrong = next((name for name, ids in texts.items() if not _are_texts(ids)), None)
        if wrong is not None:
            raise DataError(f"'{self.path / 'img2txts.json'}': '{wrong}' has {texts[wrong]!r:.40}, not a list of ids")
        return texts

    def __getitem__(self, id: str) -> dict[str, Any]:
        """Read an example.

        Raises:
            DataError: it is missing or damaged.
        """
        value = self._reader.get(id)
        if value is None:
            raise DataError(f"text database '{self.path}' has no example '{id}', but a list of ids names it")
        try:
            decompressor = lz4.frame.LZ4FrameDecompressor()
            data = decompressor.decompress(value, max_length=MAX_EXAMPLE_BYTES)
            if not decompressor.eof:
                raise ValueError("it does not end within its value")
            example = msgpack.unpackb(data, raw=False, strict_map_key=False)
        except Exception as error:  # whatever the libraries come across in a damaged value
            raise self._damaged(id, one_line(error)) from error
        if not isinstance(example, dict):
            raise self._damaged(id, f"{type(example).__name__} instead of a map")
        return example

    def check(self, id: str) -> None:
        """Read an example, and refuse word-pieces that the vocabulary has not.

        Raises:
            DataError: it is missing or damaged, or holds such a word-piece.
        """
        example = self[id]
        for name, text in example.items():
            if name.startswith("input_ids"):
                pieces = [piece for part in text for piece in (part if isinstance(part, list) else [part])]
                wrong = [piece for piece in pieces if type(piece) is not int or not 0 <= piece < self._words]
                if wrong:
                    raise self._damaged(id, f"{name} has the word-piece {wrong[0]!r:.40}; there are {self._words}")

    @property
    def _words(self) -> int:
        return self.vocab_size + _EXTRA_WORDS

    def read_json(self, name: str) -> Any:
        """Read a JSON file of the database (``refs.json``, say).

        Raises:
            DataError: it is missing or not JSON.
        """
        try:
            regular_file(self.path / name)
            return parse_json((self.path / name).read_bytes().decode("utf-8-sig"))
        except UNREADABLE as error:
            raise self._unreadable(name, error) from error

    def fingerprint(self) -> str:
        """Hash the lists of examples and some examples: equal on all machines that hold the same data."""
        digest = hashlib.blake2b(digest_size=16)
        for kind in ("", "qa", "qar"):
            if (self.path / self.lengths_file(kind)).exists():
                lengths = self.lengths(kind)
                digest.update(f"{kind}\0".encode())
                digest.update(lengths.texts.digest or b"")
                digest.update(np.ascontiguousarray(lengths.values_array, "<i4").data)
                digest.update(self._reader.sample(lengths.texts))
        return digest.hexdigest()

    def lengths_file(self, kind: str) -> str:
        """Name of the file of the lengths of a kind."""
        return "id2len" + (f"_{kind}" if kind else "") + (f".{self.subset}" if self.subset else "") + ".json"

    def _read_object(self, name: str) -> dict[str, Any]:
        value = self.read_json(name)
        if not isinstance(value, dict):
            raise self._unreadable(name, NotAnObjectError(type(value).__name__))
        return value

    def _unreadable(self, name: str, error: Exception) -> DataError:
        if isinstance(error, NotAnObjectError):
            return DataError(f"'{self.path / name}' holds a JSON {error.kind}; an object is needed")
        if not isinstance(error, OSError):
            return DataError(f"'{self.path / name}' is not valid JSON ({one_line(error)}); copy it again")
        present = ", ".join(sorted(file.name for file in self.path.glob("*.json"))) or "no JSON file"
        return DataError(
            f"text database '{self.path}' lacks {name} ({error.strerror}; it has {present}); "
            "is it the database of another task?"
        )

    def _damaged(self, id: str, reason: str) -> DataError:
        return DataError(f"text database '{self.path}': example '{id}' is damaged ({reason}); copy it again")


def check_meta(meta: Mapping[str, Any], where: str) -> None:
    """Refuse a ``meta.json`` without the ids that every task needs.

    Args:
        meta: its contents.
        where: its name for messages.

    Raises:
        DataError: CLS, SEP, MASK or v_range is missing or wrong.
    """
    for key in ("CLS", "SEP", "MASK"):
        if type(meta.get(key)) is not int or meta[key] < 0:
            raise DataError(f"{where}: {key} is {meta.get(key)!r:.40}; it must be the id of a word-piece")
    bounds = meta.get("v_range")
    if not isinstance(bounds, list) or [type(bound) for bound in bounds] != [int, int]:
        raise DataError(f"{where}: v_range is {bounds!r:.40}; it must be two ids, [first, end]")
    if not 0 <= bounds[0] < bounds[1]:
        raise DataError(f"{where}: v_range {bounds} is empty; its end must be above its first id")


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
