"""Texts linked to boxes, read as a trained model's own data."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from villa.analysis.robustness import chosen
from villa.batch import Batch
from villa.config.schema import ProbeConfig
from villa.datasets.base import Example
from villa.datasets.linked import flickr30k, generated, lines, nlvr, visual_genome
from villa.datasets.linked.example import Linked
from villa.datasets.own.files import FileStore
from villa.datasets.own.pictures import read_picture
from villa.datasets.own.question_answering import QuestionAnswering
from villa.datasets.own.readers import Record, RegionReader, WordPieces
from villa.datasets.own.records import REGION_FIELDS, Regions, Request
from villa.datasets.own.split import TableSplit
from villa.datasets.stores import ImageSource, RegionStore
from villa.datasets.synthetic.world import FEATURE_DIM, VOCABULARY
from villa.datasets.text import characters_of, load_tokenizer
from villa.datasets.uniter.databases import DatabaseTask
from villa.datasets.uniter.image_lmdb import ImageStore
from villa.datasets.uniter.index import Names
from villa.engine.setup import Parts
from villa.errors import ConfigError, DataError, about
from villa.files import local_path

#: Readers of the released forms, and of the user's own.
_READERS: Mapping[str, Callable[[Path, str | None], Iterator[Linked]]] = {
    "flickr30k_entities": flickr30k.read,
    "visual_genome": visual_genome.read,
    "nlvr": nlvr.read,
    "lines": lines.read,
}
#: Texts of generated data if their number is not limited, and the longest text in tokens without a recipe's.
_GENERATED, _LONGEST = 500, 60
_ID = re.compile(r"\{id(?::(\d{1,2}))?\}")


class LinkedTexts:
    """Linked texts with their examples.

    Args:
        parts: the model and its data, which read the images.
        texts: the texts.
        tokenizer: tokenizes the texts, if the data does not.

    Attributes:
        texts: the texts, with boxes as fractions of their images.

    Raises:
        ConfigError: the data reads no images.
        DataError: an image or feature file cannot be read.
    """

    def __init__(self, parts: Parts, texts: Sequence[Linked], tokenizer: Tokenizer | None) -> None:
        self._parts = parts
        self.texts = [_sized(text) for text in texts]
        if tokenizer is None:
            assert isinstance(parts.data, QuestionAnswering)
            records = [
                Request({"id": text.id, "text": text.text, **dict(text.files)}, text.where) for text in self.texts
            ]
            self._split, self._collate = parts.data.requests(records), parts.data.collate
            self.tokenizer = tokenizer_of(parts.data)
        else:
            most = getattr(parts.config.dataset, "max_text_length", _LONGEST)
            reader = RegionReader(WordPieces(tokenizer, most), FileStore)
            sources = [ImageSource(local_path(dict(text.files)["features"]), text.where) for text in self.texts]
            rows = [Record(text.id, text.text, images=(n,), where=text.where) for n, text in enumerate(self.texts)]
            self._split = TableSplit(rows, reader, _regions(parts, sources))
            self._collate, self.tokenizer = reader.collate, tokenizer

    def batch(self, places: Sequence[int]) -> Batch:
        """Return a batch of some texts."""
        examples: list[Example] = []
        for place in places:
            with about(self.texts[place].where):
                examples.append(self._split[place])
        return self._collate(examples)

    def digest(self, *, dated: bool) -> str:
        """Return what changes if the texts, their links or their files do.

        Args:
            dated: whether files of another date are others.
        """
        found, stamp = hashlib.sha256(), cache(partial(_stamp, dated=dated))  # texts share images, and those a database
        for text in self.texts:
            places = [Path(local_path(name)) for _, name in text.files]
            stamps = [[place.name, *stamp(place if place.exists() else place.parent)] for place in places]
            facts = asdict(replace(text, files=(), where="", size=None))
            found.update(json.dumps([facts, stamps], sort_keys=True).encode())
        return found.hexdigest()

    def characters(self, place: int, ids: Sequence[int]) -> list[tuple[int, int] | None]:
        """Return the characters of a text that each of its tokens stands for; None for special tokens and padding."""
        with about(self.texts[place].where):
            return characters_of(self.tokenizer, self.texts[place].text, ids)


class _OfDatabase(RegionStore):
    """Images of a database of region features.

    Args:
        database: the database.
        sources: the images; the name of a file is that of an image in the database.

    Raises:
        DataError: the database lacks one.
    """

    def __init__(self, database: ImageStore, sources: Sequence[ImageSource]) -> None:
        super().__init__(sources)
        self.dim, self._database = database.dim, database
        self._rows = database.find(Names.of([source.path.name for source in sources]).column).tolist()
        lacking = next((source for source, row in zip(sources, self._rows, strict=True) if row < 0), None)
        if lacking is not None:
            known = next(iter(database.names), "nothing")
            raise DataError(
                f"{lacking.place}image database '{database.folder}' has no image '{lacking.path.name}', but such as "
                f"'{known}'; name them by probe.file"
            )

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._database[self._rows[index]]

    def regions(self, index: int) -> int:
        """Return the number of regions of an image."""
        return self._database.count(self._rows[index])

    def prepare(self, indices: Iterable[int]) -> None:
        """Read the images, which checks them."""
        for index in indices:
            self[index]


def _stamp(path: Path, *, dated: bool) -> list[int]:
    """Return size and date of a file, or of the databases in a folder."""
    files = [path] if path.is_file() else _databases(path)
    return [number for file in files for number in (file.stat().st_size, file.stat().st_mtime_ns if dated else 0)]


def _databases(folder: Path) -> list[Path]:
    """Return the image databases in a folder."""
    return sorted(folder.glob("*/data.mdb"))


def _regions(parts: Parts, sources: Sequence[ImageSource]) -> RegionStore:
    """Return the regions of feature files or, if the run is on databases and they lie in one, of that."""
    folder = sources[0].path.parent
    if isinstance(parts.data, DatabaseTask) and _databases(folder):
        return _OfDatabase(parts.data.image_database(folder, parts.data.config.detected_boxes()), sources)
    return FileStore(sources)


@contextmanager
def open_linked(parts: Parts, config: ProbeConfig) -> Iterator[LinkedTexts]:
    """Open the texts that a recipe names, for a model; generated ones are removed afterwards.

    Raises:
        ConfigError: the model cannot read them.
        DataError: a file is missing or damaged.
    """
    with TemporaryDirectory(prefix="villa_") as folder:
        if config.data == "generated":
            yield _generated(parts, config, Path(folder))
            return
        regions, tokenizer = _reading(parts, config)
        texts = list(_READERS[config.data](local_path(str(config.path)), config.split))
        if not texts:
            raise DataError(f"'{config.path}' holds no text with a link or relation; give other data (probe.path)")
        kept = [texts[place] for place in chosen(len(texts), config.examples, config.seed)]
        yield LinkedTexts(parts, [_with_file(text, regions, config) for text in kept], tokenizer)


def tokenizer_of(data: QuestionAnswering) -> Tokenizer:
    """Return the tokenizer of a data set, also if it is within a model's own processor.

    Raises:
        ConfigError: it does not tell where its tokens come from.
    """
    vocabulary = data.vocabulary
    if vocabulary.tokenizer is not None:
        return vocabulary.tokenizer
    found = getattr(getattr(vocabulary.processor, "tokenizer", vocabulary.processor), "backend_tokenizer", None)
    if not isinstance(found, Tokenizer):
        raise ConfigError("the model's tokenizer is written in Python, and does not tell where its tokens come from")
    return found


def _generated(parts: Parts, config: ProbeConfig, folder: Path) -> LinkedTexts:
    count, facts = config.examples or _GENERATED, parts.data.facts()
    if isinstance(parts.data, QuestionAnswering):
        if parts.data.vocabulary.regions in ("grid", "pixels"):
            return LinkedTexts(parts, list(generated.pictures(count, config.seed, folder)), None)
    elif (facts.feature_dim, facts.vocab_size) == (FEATURE_DIM, VOCABULARY):
        return LinkedTexts(parts, list(generated.regions(count, config.seed, folder)), generated.tokenizer())
    raise ConfigError(
        "probe.data=generated is for models that read images, or that were trained with dataset.synthetic=true; give "
        "flickr30k_entities, visual_genome, nlvr or lines, and probe.path"
    )


def _reading(parts: Parts, config: ProbeConfig) -> tuple[Regions, Tokenizer | None]:
    """Return what the model reads of images, and the tokenizer that the recipe names."""
    if isinstance(parts.data, QuestionAnswering):
        if parts.data.vocabulary.regions == "none":
            raise ConfigError("this model reads texts alone, and gives no attention to images")
        if config.tokenizer is not None:
            raise ConfigError(
                f"probe.tokenizer='{config.tokenizer}' has no effect: the run has a tokenizer; leave it out"
            )
        return parts.data.vocabulary.regions, None
    if parts.data.facts().feature_dim is None:
        raise ConfigError(f"dataset '{parts.config.dataset.name}' reads no images that could be probed")
    if config.tokenizer is None:
        raise ConfigError(
            "the texts of this run were tokenized beforehand; give the tokenizer that did it: probe.tokenizer=vocab.txt"
        )
    return "files", load_tokenizer(local_path(config.tokenizer))


def _with_file(text: Linked, regions: Regions, config: ProbeConfig) -> Linked:
    """Return a text with the file that the model reads for its image."""
    field = REGION_FIELDS[regions]
    files = dict(text.files)
    if config.images is not None:
        usual = "{id}.npz" if field == "features" else "{id}.jpg"
        name = _ID.sub(lambda match: text.image.zfill(int(match[1] or 0)), config.file or usual)
        files[field] = str(local_path(config.images) / name)
    if field not in files:
        what = "feature files" if field == "features" else "images"
        raise ConfigError(f"the model reads {what}, which the data does not name; give their folder: probe.images=...")
    return replace(text, files=tuple(files.items()))


def _sized(text: Linked) -> Linked:
    """Return a text with boxes as fractions of its image."""
    if text.size is not None:
        return text.normalised(text.size)
    file = dict(text.files).get("image")
    if file is None:
        raise DataError(f"{text.where}: the size of the image is not known; give 'size', or the image itself")
    return text.normalised(read_picture(ImageSource(local_path(file), text.where)).size)


def real_tokens(batch: Batch, row: int) -> list[int]:
    """Return the token ids of a row without its padding."""
    assert batch.input_ids is not None
    ids: Any = batch.input_ids[row]
    return list(map(int, ids if batch.attention_mask is None else ids[batch.attention_mask[row].bool()]))
