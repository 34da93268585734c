"""Text databases in the format of UNITER and VILLA: an LMDB environment of examples with JSON files.

Values are ``lz4.frame``-compressed msgpack maps; ``id2len.json`` defines the order of the examples.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import lz4.frame
import msgpack
import numpy as np
from tokenizers import Tokenizer

from villa.datasets.checksums import SUFFIX, check_sizes
from villa.datasets.ragged import Integers
from villa.datasets.text import TOKENIZER_FILE, load_tokenizer
from villa.datasets.uniter.index import Column, Names, bytes_of, numbers_of
from villa.datasets.uniter.json_tables import (
    UNREADABLE,
    NamedImages,
    NotAnObjectError,
    WrongEntryError,
    read_images,
    read_numbers,
)
from villa.datasets.uniter.lmdb_env import LmdbReader
from villa.errors import DataError, one_line
from villa.files import regular_file
from villa.json_values import parse_json

#: Largest example in bytes after decompression; damaged or hostile values may claim more.
MAX_EXAMPLE_BYTES = 1 << 26
#: Largest number of bytes that LZ4 decompresses from one.
MAX_EXPANSION = 255
#: Checksum file that villa writes beside its own databases.
CHECKSUMS = f"db{SUFFIX}"
#: Tokens of VCR beyond its tokenizer's: object names.
_EXTRA_WORDS = 81


class TextStore:
    """The examples of one split by row, their position in ``id2len.json``.

    Args:
        path: the folder (``vqa_train.db``).
        subset: use the examples listed in ``id2len.<subset>.json`` instead of ``id2len.json``.

    Attributes:
        path: the folder.
        meta: contents of ``meta.json``.
        kind: ``qa`` or ``qar`` for VCR's two lists, otherwise ``""``.

    Raises:
        DataError: the folder is not a text database.
    """

    def __init__(self, path: Path, subset: str | None = None) -> None:
        self.path, self.subset, self.kind = path, subset, ""
        if not path.is_dir():
            raise DataError(
                f"text database '{path}' is not a folder; give one with data.mdb, meta.json and id2len.json"
            )
        check_sizes(path / CHECKSUMS)
        self._reader = LmdbReader(path)
        self.meta: Mapping[str, Any] = self._read_object("meta.json")
        check_meta(self.meta, f"'{path / 'meta.json'}'")

    def of_kind(self, kind: str) -> TextStore:
        """Return the examples of another list of the database (VCR's ``qa`` or ``qar``)."""
        if kind == self.kind:
            return self
        other = copy.copy(self)
        other.kind = kind
        other.__dict__.pop("_list", None)
        return other

    def kinds(self) -> list[str]:
        """Return the kinds of the database's lists."""
        return [kind for kind in ("", "qa", "qar") if self.of_kind(kind).list_file.exists()]

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
        """Vocabulary size: the end of ``v_range``."""
        return int(self.meta["v_range"][1])

    @property
    def tokenizer(self) -> str | None:
        """Name of the tokenizer, if recorded."""
        return next((self.meta[key] for key in ("bert", "toker", "tokenizer") if key in self.meta), None)

    @cached_property
    def vocabulary(self) -> Tokenizer | None:
        """The tokenizer in the folder, if ``tools/make_text_db.py`` put it there."""
        file = self.path / TOKENIZER_FILE
        return load_tokenizer(file) if file.is_file() else None

    @property
    def list_file(self) -> Path:
        """File with the examples and their lengths."""
        kind, subset = (f"_{self.kind}" if self.kind else ""), (f".{self.subset}" if self.subset else "")
        return self.path / f"id2len{kind}{subset}.json"

    @property
    def images_file(self) -> Path:
        """File with the examples' images."""
        return self.path / "txt2img.json"

    @property
    def ids(self) -> Names:
        """Ids of the examples."""
        return self._list[0]

    @property
    def lengths(self) -> Integers:
        """Number of word-pieces of every example, without [CLS] and [SEP] ``[N]`` int32."""
        return self._list[1]

    @cached_property
    def _list(self) -> tuple[Names, Integers]:
        """Read ids and lengths.

        Raises:
            DataError: the file is missing or has other contents.
        """
        with self._reading(self.list_file, "'{file}': the length of '{name}' is {value}, not a number"):
            table = read_numbers(self.list_file, 0)
        return Names(table["name"]), numbers_of(table["number"])

    def named_images(self) -> NamedImages:
        """Read the image names of every example from ``txt2img.json``.

        Raises:
            DataError: the file is missing or has other contents.
        """
        with self.reading_images():
            return read_images(self.images_file)

    def reading_images(self) -> AbstractContextManager[None]:
        """Report errors in reading ``txt2img.json`` in one line."""
        return self._reading(self.images_file, "'{file}': '{name}' has {value}, not one or several file names")

    @cached_property
    def texts_of_images(self) -> Mapping[str, list[str]]:
        """Ids of the texts of every image (``img2txts.json``; retrieval only)."""
        texts = self._read_object("img2txts.json")
        wrong = next((name for name, ids in texts.items() if not _are_texts(ids)), None)
        if wrong is not None:
            raise DataError(f"'{self.path / 'img2txts.json'}': '{wrong}' has {texts[wrong]!r:.40}, not a list of ids")
        return texts

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Read an example.

        Raises:
            DataError: the example is missing or damaged.
        """
        id = self.ids[row]
        value = self._reader.get(id)
        if value is None:
            raise DataError(f"text database '{self.path}' has no example '{id}', but a list of ids names it")
        try:
            decompressor = lz4.frame.LZ4FrameDecompressor()
            # Memory for the limit is allocated first, hence no more than the value can expand to.
            data = decompressor.decompress(value, max_length=min(MAX_EXPANSION * len(value), MAX_EXAMPLE_BYTES))
            if not decompressor.eof:
                raise ValueError("it does not end within its value")
            example = msgpack.unpackb(data, raw=False, strict_map_key=False)
        except Exception as error:  # a damaged value may raise anything
            raise self._damaged(id, one_line(error)) from error
        if not isinstance(example, dict):
            raise self._damaged(id, f"{type(example).__name__} instead of a map")
        return example

    def check(self, row: int) -> None:
        """Read an example and check that its word-pieces are in the vocabulary.

        Raises:
            DataError: the example is missing or damaged, or a word-piece is outside the vocabulary.
        """
        example = self[row]
        for name, text in example.items():
            if name.startswith("input_ids"):
                pieces = [piece for part in text for piece in (part if isinstance(part, list) else [part])]
                wrong = [piece for piece in pieces if type(piece) is not int or not 0 <= piece < self._words]
                if wrong:
                    raise self._damaged(
                        self.ids[row], f"{name} has the word-piece {wrong[0]!r:.40}; there are {self._words}"
                    )

    @property
    def _words(self) -> int:
        return self.vocab_size + _EXTRA_WORDS

    def read_json(self, name: str) -> Any:
        """Read a JSON file of the database, such as ``refs.json``.

        Raises:
            DataError: the file is missing or not JSON.
        """
        try:
            regular_file(self.path / name)
            return parse_json((self.path / name).read_bytes().decode("utf-8-sig"))
        except UNREADABLE as error:
            raise self._unreadable(name, error) from error

    def fingerprint(self) -> str:
        """Hash the lists of examples and some examples; equal on all machines with the same data."""
        digest = hashlib.blake2b(digest_size=16)
        for kind in self.kinds():
            store = self.of_kind(kind)
            digest.update(f"{kind}\0".encode())
            digest.update(_digest(store.ids.column))
            digest.update(np.ascontiguousarray(store.lengths, "<i4").data)
            digest.update(self._reader.sample(store.ids))
        return digest.hexdigest()

    @contextmanager
    def _reading(self, file: Path, wrong: str) -> Iterator[None]:
        """Report errors in reading a list in one line.

        Args:
            file: the list.
            wrong: message for an invalid entry, a format string with ``file``, ``name`` and ``value``.
        """
        try:
            yield
        except WrongEntryError as error:
            raise DataError(wrong.format(file=file, name=error.name, value=f"{error.value!r:.40}")) from error
        except UNREADABLE as error:
            raise self._unreadable(file.name, error) from error

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


def _digest(ids: Column) -> bytes:
    """Hash the bytes and bounds of strings."""
    chunks = list(map(bytes_of, ids.chunks))
    size = sum(len(data) for data, _ in chunks)
    kind = np.int32 if size + 8 <= np.iinfo(np.int32).max else np.int64
    digest = hashlib.blake2b(digest_size=16)
    for data, _ in chunks:
        digest.update(data)
    digest.update(bytes(8))
    digest.update(bytes(kind(0).nbytes))
    start = 0
    for data, bounds in chunks:
        digest.update((bounds[1:] + kind(start)).data)
        start += len(data)
    return digest.digest()


def check_meta(meta: Mapping[str, Any], where: str) -> None:
    """Check that ``meta.json`` has the ids that every task needs.

    Args:
        meta: contents of the file.
        where: name of the file for messages.

    Raises:
        DataError: CLS, SEP, MASK or v_range is missing or invalid.
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
