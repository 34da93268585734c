"""Base of the tasks on the text and image databases of UNITER and VILLA.

A recipe lists, for each split, text databases and the image database of each; a task turns their contents into
examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from villa.config.variants import Overlay
from villa.datasets.base import DatasetConfig, Split
from villa.datasets.epochs import check_fraction, share_rows
from villa.datasets.names import text_facts
from villa.datasets.paths import SPLITS, DatabasePaths, describe_missing
from villa.datasets.ragged import Integers
from villa.datasets.released import ReleasedFilesConfig, ReleasedFilesTask
from villa.datasets.signatures import check_signatures, check_trained, extractor_reading
from villa.datasets.synthetic.overlay import SMALL
from villa.datasets.uniter.box_selection import BoxSelection
from villa.datasets.uniter.database_split import ConcatenatedSplit, DatabaseSplit, Images, Pair
from villa.datasets.uniter.image_lmdb import ImageStore
from villa.datasets.uniter.text_lmdb import TextStore
from villa.errors import ConfigError, DataError, MissingDataError
from villa.facts import DataFacts


@dataclass
class DatabaseConfig(ReleasedFilesConfig):
    """Options of the tasks on databases; relative paths are below ``root``.

    Attributes:
        train_text: text databases to train on.
        train_images: image database of each of them.
        val_text: text databases to validate on.
        val_images: image database of each of them.
        test_text: text databases to test on.
        test_images: image database of each of them.
        subset: train on the examples that ``id2len.<subset>.json`` lists instead of ``id2len.json``.
        max_text_length: longest text to train on, by the lengths in ``id2len.json`` (word-pieces without [CLS] and
            [SEP]; for VCR see docs/databases.md); longer ones are left out.
        fraction: share of each text database's examples to train on; a smaller share is part of a larger one.
        fraction_seed: of the choice of that share.
        box_threshold: confidence above which a detected box is used.
        max_boxes: largest number of detected boxes an image.
        min_boxes: smallest number of detected boxes an image.
        fixed_boxes: this many boxes of every image instead.
        compressed: the image databases are the compressed ones.
    """

    OVERLAYS: ClassVar[tuple[Overlay, ...]] = SMALL

    train_text: list[str] = field(default_factory=list)
    train_images: list[str] = field(default_factory=list)
    val_text: list[str] = field(default_factory=list)
    val_images: list[str] = field(default_factory=list)
    test_text: list[str] = field(default_factory=list)
    test_images: list[str] = field(default_factory=list)
    subset: str | None = None
    max_text_length: int = 60
    fraction: float = 1.0
    fraction_seed: int = 0
    box_threshold: float = 0.2
    max_boxes: int = 100
    min_boxes: int = 10
    fixed_boxes: int | None = None
    compressed: bool = False

    def check(self) -> None:
        """Check that the options are consistent."""
        super().check()
        for split in SPLITS:
            texts, images = len(getattr(self, f"{split}_text")), len(getattr(self, f"{split}_images"))
            if texts != images:
                raise ConfigError(
                    f"dataset.{split}_images names {images} image databases for {texts} text databases in "
                    f"{split}_text; give one for each"
                )
        if self.max_text_length < 1:
            raise ConfigError(f"dataset.max_text_length={self.max_text_length} is too small; give at least 1")
        check_fraction(self.fraction)
        self.detected_boxes()

    def detected_boxes(self) -> BoxSelection:
        """Selection of an image's detected boxes.

        Raises:
            ConfigError: the numbers are inconsistent.
        """
        return BoxSelection(self.box_threshold, self.max_boxes, self.min_boxes, self.fixed_boxes, self.compressed)


class DatabaseTask(ReleasedFilesTask):
    """A task on databases. A subclass names its split class and decodes its logits.

    Attributes:
        Examples: class of the splits.
        labels: class names, if the task fixes them.
        extra_words: rows of the word embedding beyond the tokenizer's.
        left_out: notes on the examples excluded from training, by text database.
    """

    Config: ClassVar[type[DatasetConfig]] = DatabaseConfig
    config: DatabaseConfig
    Examples: ClassVar[type[DatabaseSplit]]
    labels: ClassVar[tuple[str, ...] | None] = None
    extra_words: ClassVar[int] = 0

    def __init__(self, config: Any, assets: Path | None = None) -> None:
        super().__init__(config, assets)
        self._opened: dict[DatabasePaths, Pair] = {}
        self.left_out: dict[Path, list[str]] = {}

    def listed(self, split: str) -> Sequence[str]:
        """Return the text databases of a split."""
        names: Sequence[str] = getattr(self.config, f"{split}_text")
        return names

    def open_split(self, name: str) -> Split:
        """Open a split over all its databases."""
        parts = [part for paths in self._paths(name) for part in self.parts(name, self._open(paths))]
        if not parts:
            raise DataError(f"dataset '{self.config.name}' has no split '{name}'; list databases in {name}_text")
        return parts[0] if len(parts) == 1 else ConcatenatedSplit(parts)

    def parts(self, name: str, pair: Pair) -> list[Split]:
        """Return the splits made from one pair of databases."""
        return [self.Examples(self, name, pair, self.chosen(name, pair.text))]

    def chosen(self, name: str, text: TextStore) -> Integers:
        """Return the rows of a split's texts; in training, without those that are too long."""
        if not len(text):
            raise DataError(f"text database '{text.path}' lists no examples; make it again")
        if name != "train":
            return np.arange(len(text), dtype=np.int32)
        chosen = share_rows(len(text), self.config.fraction, self.config.fraction_seed)
        rows: Integers = chosen[text.lengths[chosen] <= self.config.max_text_length]
        if not len(rows):
            raise DataError(
                f"all {len(chosen)} texts of '{text.path}' are longer than "
                f"dataset.max_text_length={self.config.max_text_length}; raise it"
            )
        longest = int(text.lengths[chosen].max())
        self.left_out[text.path] = list(self._why_left_out(text.path, len(text), len(chosen), len(rows), longest))
        return rows

    def _why_left_out(self, path: Path, count: int, chosen: int, kept: int, longest: int) -> Iterator[str]:
        """Yield notes on how many of ``count`` examples the share and the longest text exclude."""
        fraction, limit = self.config.fraction, self.config.max_text_length
        if chosen < count:
            yield f"'{path}': dataset.fraction={fraction} leaves out {count - chosen:,} of {count:,} examples"
        if kept < chosen:
            yield (
                f"'{path}': {chosen - kept:,} of {chosen:,} texts are longer than dataset.max_text_length={limit} "
                f"and are left out; the longest has {longest}"
            )

    def facts(self) -> DataFacts:
        """Return the sizes of vocabulary, labels and region features, which all databases share."""
        pair = self._first
        text = pair.text
        texts = {} if text.vocabulary is None else text_facts(text.vocabulary)
        named = {} if text.tokenizer is None else {"tokenizer": text.tokenizer}
        special = {"[CLS]": str(text.cls_id), "[SEP]": str(text.sep_id), "[MASK]": str(text.mask_id)}
        facts = DataFacts(
            vocab_size=text.vocab_size + self.extra_words,
            num_labels=self.num_labels(),
            feature_dim=pair.images.dim,
            labels=self.label_names(),
            tokens=self._tokens(texts.get("tokens"), text.vocab_size),
            padding=texts.get("padding"),
            reading={**texts.get("reading", {}), **named, **special, **extractor_reading(pair.images.extractor)},
        )
        self._check_against_checkpoint(facts)
        return facts

    def _tokens(self, names: Sequence[str | None] | None, size: int) -> tuple[str | None, ...] | None:
        """Return the names of all rows of the word embedding, if the tokenizer's are known."""
        if names is None:
            return None
        words = (*names[:size], *[None] * (size - len(names)))
        return (*words, *(f"object {number}" for number in range(self.extra_words)))

    def label_names(self) -> tuple[str, ...] | None:
        """Return the class names, or None."""
        return self.labels

    def num_labels(self) -> int | None:
        """Return the number of classes, or None if the head fixes it."""
        labels = self.label_names()
        return None if labels is None else len(labels)

    def submission(self, split: str) -> str | None:
        """Return the submission format named like the data set."""
        return str(self.config.name)

    def kept_facts(self) -> dict[str, Any]:
        """Return the facts and the tokenizer's name."""
        return {**super().kept_facts(), "tokenizer": self._first.text.tokenizer}

    def contents(self) -> Iterator[Any]:
        """Yield the databases that exist."""
        for paths in self._present():
            pair = self._open(paths)
            yield [paths.split, pair.text.fingerprint(), pair.images.fingerprint()]

    def open_images(self, paths: DatabasePaths) -> Images:
        """Open the image database of a split."""
        return self.image_database(paths.images[0], self.config.detected_boxes())

    def image_database(self, folder: Path, boxes: BoxSelection) -> ImageStore:
        """Open an image database with the task's options."""
        return ImageStore(folder, boxes, allow_empty_boxes=self.config.allow_empty_boxes)

    @cached_property
    def _first(self) -> Pair:
        listed = [paths for name in self.splits() for paths in self._paths(name)]
        if not listed:
            raise DataError(f"dataset '{self.config.name}' lists no database; set dataset.train_text and train_images")
        return self._open(next(self._present(), listed[0]))

    def _present(self) -> Iterator[DatabasePaths]:
        every = (paths for name in self.splits() for paths in self._paths(name))
        return (paths for paths in every if not any(paths.missing()))

    def _paths(self, name: str) -> Iterator[DatabasePaths]:
        config = self.config
        if config.synthetic:
            yield DatabasePaths.synthetic(self.root, config.name, name)
            return
        for text, images in zip(self.listed(name), getattr(config, f"{name}_images"), strict=True):
            yield DatabasePaths.of(self.root, name, text, images)

    def _open(self, paths: DatabasePaths) -> Pair:
        """Open a pair of databases, and check that it matches those opened before."""
        if paths in self._opened:
            return self._opened[paths]
        if any(paths.missing()):
            missing = [path for name in self.splits() for paths in self._paths(name) for path in paths.missing()]
            raise MissingDataError(describe_missing(self.config.name, self.config.root, missing))
        subset = self.config.subset if paths.split == "train" else None
        pair = Pair(TextStore(paths.text, subset), self.open_images(paths))
        for other in self._opened.values():
            _check_alike(pair, other)
        self._opened[paths] = pair
        return pair

    def _check_against_checkpoint(self, facts: DataFacts) -> None:
        if self.assets is None:
            return
        trained = self.trained_facts
        if (facts.feature_dim, facts.vocab_size) != (trained["feature_dim"], trained["vocab_size"]):
            raise DataError(
                f"the checkpoint was trained on region features {trained['feature_dim']} wide and "
                f"{trained['vocab_size']} word-pieces, but '{self._first.text.path}' and its images have "
                f"{facts.feature_dim} and {facts.vocab_size}; use the features and the tokenizer of the training data"
            )
        check_trained(trained, facts.reading, self._first.text.path)
        before, now = trained.get("tokenizer"), self._first.text.tokenizer
        words, here = trained.get("tokens"), facts.tokens
        if (tuple(words) != here) if words and here else None not in (before, now) and before != now:
            raise DataError(
                f"the checkpoint was trained on the word-pieces of tokenizer {before}, but '{self._first.text.path}' "
                f"was made with {now} or another vocabulary of that name; make it with the tokenizer of training"
            )


def _check_alike(pair: Pair, other: Pair) -> None:
    """Check that one model can read both pairs of databases."""
    for what, ours, theirs in (
        ("tokenizer", pair.text.tokenizer, other.text.tokenizer),
        ("vocabulary", pair.text.vocab_size, other.text.vocab_size),
    ):
        if None not in (ours, theirs) and ours != theirs:
            raise DataError(
                f"text database '{pair.text.path}' was made with {what} {ours}, '{other.text.path}' with {theirs}; "
                "make both with one tokenizer"
            )
    if pair.images.dim != other.images.dim:
        raise DataError(
            f"the images of '{pair.text.path}' have features {pair.images.dim} wide, those of '{other.text.path}' "
            f"{other.images.dim}; use features of one detector"
        )
    check_signatures([(other.text.path, other.images.extractor), (pair.text.path, pair.images.extractor)])
