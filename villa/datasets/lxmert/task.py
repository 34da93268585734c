"""LXMERT's tasks (VQA, GQA, NLVR2) on its released files: annotations in JSON, features in ``*_obj36.tsv``."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import Tokenizer
from torch import Tensor

from villa.batch import Batch
from villa.config.variants import Overlay
from villa.datasets.base import DatasetConfig, best_answers, read_answers
from villa.datasets.lxmert.features import TsvFile, TsvStore
from villa.datasets.lxmert.split import AnnotatedSplit, ImagePairSplit, QuestionSplit
from villa.datasets.names import text_facts
from villa.datasets.own.readers import WordPieces
from villa.datasets.paths import SPLITS, describe_missing
from villa.datasets.released import ANSWERS_FILE, ReleasedFilesConfig, ReleasedFilesTask
from villa.datasets.signatures import check_signatures, check_trained, extractor_reading
from villa.datasets.synthetic.lxmert import GENERATED_ANSWERS, SMALL_LXMERT, VOCABULARY_FILE, write_lxmert
from villa.datasets.text import SHORTEST, load_tokenizer, save_tokenizer, vocabulary_size
from villa.errors import ConfigError, DataError, MissingDataError
from villa.facts import DataFacts
from villa.files import plain_path, sha256, write_json
from villa.registry import register_dataset


@dataclass
class LxmertDataConfig(ReleasedFilesConfig):
    """Options shared by LXMERT's tasks; relative paths are below ``root``.

    Attributes:
        train: annotation files of the training split.
        train_features: feature files with its images.
        val: annotation files of the validation split.
        val_features: feature files with its images.
        test: annotation files of the test split.
        test_features: feature files with its images.
        tokenizer: ``vocab.txt`` of bert-base-uncased, or another tokenizer's file or folder.
        max_text_length: tokens that texts are truncated to, [CLS] and [SEP] included.
    """

    OVERLAYS: ClassVar[tuple[Overlay, ...]] = SMALL_LXMERT

    train: list[str] = field(default_factory=list)
    train_features: list[str] = field(default_factory=list)
    val: list[str] = field(default_factory=list)
    val_features: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    test_features: list[str] = field(default_factory=list)
    tokenizer: str = "pretrained/bert-base-uncased/vocab.txt"
    max_text_length: int = 20

    def check(self) -> None:
        """Refuse options that cannot be combined."""
        super().check()
        for split in SPLITS:
            if bool(getattr(self, split)) != bool(getattr(self, f"{split}_features")):
                raise ConfigError(f"dataset.{split} and dataset.{split}_features go together; list files in both")
        if self.max_text_length < SHORTEST:
            raise ConfigError(f"dataset.max_text_length={self.max_text_length} is too small; give at least {SHORTEST}")


@dataclass
class LxmertAnswersConfig(LxmertDataConfig):
    """Options of VQA and GQA.

    Attributes:
        answers: JSON file with the label of every answer (the released ``trainval_ans2label.json``), below ``root``.
    """

    name: str = "lxmert_vqa"
    answers: str = "lxmert/vqa/trainval_ans2label.json"


@dataclass
class LxmertGqaConfig(LxmertAnswersConfig):
    """Options of GQA."""

    name: str = "lxmert_gqa"
    answers: str = "lxmert/gqa/trainval_ans2label.json"


@dataclass
class LxmertNlvr2Config(LxmertDataConfig):
    """Options of NLVR2."""

    name: str = "lxmert_nlvr2"


class LxmertTask(ReleasedFilesTask):
    """A task of LXMERT. Subclasses name the class of their splits, their answers and their submission format.

    Attributes:
        Examples: class of the splits.
        submissions: submission format of predictions.
    """

    Config: ClassVar[type[DatasetConfig]] = LxmertDataConfig
    config: LxmertDataConfig
    Examples: ClassVar[type[AnnotatedSplit]]
    submissions: ClassVar[str]
    generator = staticmethod(write_lxmert)

    def __init__(self, config: Any, assets: Path | None = None) -> None:
        super().__init__(config, assets)
        self._features: dict[Path, TsvFile] = {}

    @property
    @abstractmethod
    def answers(self) -> list[str]:
        """Answers in the order of the logits."""

    def listed(self, split: str) -> Sequence[str]:
        """Return the annotation files of a split."""
        names: Sequence[str] = getattr(self.config, split)
        return names

    def open_split(self, name: str) -> AnnotatedSplit:
        """Read the annotations of a split, and check that their images exist."""
        if name not in self.splits():
            raise DataError(f"dataset '{self.config.name}' has no split '{name}'; list files in dataset.{name}")
        self._require(name)
        labels, store = {answer: label for label, answer in enumerate(self.answers)}, self._store(name)
        check_signatures((file.path, file.extractor) for file in self._features.values())
        return self.Examples(self._files(name), store, self.words, labels)

    def facts(self) -> DataFacts:
        """Return the vocabulary, the answers and the feature width."""
        if not self.splits():
            raise DataError(f"dataset '{self.config.name}' lists no file; set dataset.train and train_features")
        split = next(iter(self._present()), self.splits()[0])
        self._require(split)
        store = self._store(split)
        dim, made = store.dim, extractor_reading(store.extractor)
        if self.assets is not None and dim != (trained := self.trained_facts["feature_dim"]):
            raise DataError(
                f"the checkpoint was trained on region features {trained} wide, but those of the recipe "
                f"are {dim} wide; use the features of the training data"
            )
        if self.assets is not None:
            check_trained(self.trained_facts, made, store.files[0].path)
        words, texts = vocabulary_size(self.tokenizer), text_facts(self.tokenizer)
        texts["reading"] = {**texts["reading"], **made}
        return DataFacts(words, len(self.answers), dim, labels=tuple(self.answers), **texts)

    def kept_facts(self) -> dict[str, Any]:
        """Return the facts without tokenizer and answers, which have their own files."""
        return {**super().kept_facts(), "tokens": None, "labels": None}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, or else that of ``dataset.tokenizer``."""
        return load_tokenizer(
            self.assets if self.assets is not None else self._path(self.config.tokenizer, VOCABULARY_FILE)
        )

    @cached_property
    def words(self) -> WordPieces:
        """The encoder of texts as word-pieces."""
        return WordPieces(self.tokenizer, self.config.max_text_length)

    def submission(self, split: str) -> str | None:
        """Return the format of the task's leaderboard."""
        return self.submissions

    def rank(self, logits: Tensor) -> tuple[Tensor, Sequence[str]]:
        """Return the sigmoid scores of all answers."""
        return logits.float().sigmoid(), self.answers

    def decode(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Return the best answer of every row and its score."""
        return best_answers(*self.rank(logits))

    def save_assets(self, folder: Path) -> None:
        """Write tokenizer, answers and facts."""
        super().save_assets(folder)
        save_tokenizer(self.tokenizer, folder)
        write_json(folder / ANSWERS_FILE, self.answers)

    def contents(self) -> Iterator[Any]:
        """Yield the answers, the tokenizer, and the files of the splits that are present."""
        yield self.answers
        yield hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()
        for name in self._present():
            yield [name, *map(sha256, self._files(name)), *(f.fingerprint() for f in self._store(name).files)]

    def _path(self, name: str, generated: str) -> Path:
        """Return the path of a file below the root, or of the generated one."""
        return self.root / (generated if self.config.synthetic else plain_path(name))

    def _files(self, split: str, kind: str = "") -> list[Path]:
        """Return the annotation files of a split, or its feature files with kind ``"_features"``."""
        if self.config.synthetic:
            return [self.root / (f"{split}_obj36.tsv" if kind else f"{split}.json")]
        return [self.root / plain_path(name) for name in getattr(self.config, split + kind)]

    def _store(self, split: str) -> TsvStore:
        for path in self._files(split, "_features"):
            if path not in self._features:
                self._features[path] = TsvFile(path, allow_empty_boxes=self.config.allow_empty_boxes)
        return TsvStore([self._features[path] for path in self._files(split, "_features")])

    def _needed(self, split: str) -> Iterator[tuple[Path, str]]:
        """Yield the files of a split, each with a description."""
        yield from ((path, "annotations: JSON list of records") for path in self._files(split))
        features = "region features: lines of img_id, img_h, ..., boxes, features"
        yield from ((path, features) for path in self._files(split, "_features"))

    def _shared(self) -> Iterator[tuple[Path, str]]:
        """Yield the files that a checkpoint's assets replace, each with a description."""
        yield self._path(self.config.tokenizer, VOCABULARY_FILE), "tokenizer: vocab.txt of bert-base-uncased"

    def _present(self) -> list[str]:
        return [split for split in self.splits() if not _missing(self._needed(split))]

    def _require(self, split: str) -> None:
        """Check that the files of a split exist; name all that are missing."""
        shared = [] if self.assets is not None else _missing(self._shared())
        if shared or _missing(self._needed(split)):
            missing = shared + [entry for name in self.splits() for entry in _missing(self._needed(name))]
            raise MissingDataError(describe_missing(self.config.name, self.config.root, missing, "docs/lxmert.md"))


def _missing(files: Iterable[tuple[Path, str]]) -> list[tuple[Path, str]]:
    return [(path, what) for path, what in files if not path.exists()]


@register_dataset("lxmert_vqa")
class LxmertVqa(LxmertTask):
    """VQA v2: questions with scores of 3,129 answers."""

    Config: ClassVar[type[DatasetConfig]] = LxmertAnswersConfig
    config: LxmertAnswersConfig
    Examples = QuestionSplit
    submissions = "vqa"

    @property
    def answers(self) -> list[str]:
        """Answers in the order of the logits: the checkpoint's, or those of ``dataset.answers``."""
        return self._listed

    @cached_property
    def _listed(self) -> list[str]:
        return read_answers(
            self.assets / ANSWERS_FILE
            if self.assets is not None
            else self._path(self.config.answers, GENERATED_ANSWERS)
        )

    def _shared(self) -> Iterator[tuple[Path, str]]:
        yield from super()._shared()
        yield self._path(self.config.answers, GENERATED_ANSWERS), "answers: {answer: label}"


@register_dataset("lxmert_gqa")
class LxmertGqa(LxmertVqa):
    """GQA: questions with one of 1,842 answers."""

    Config: ClassVar[type[DatasetConfig]] = LxmertGqaConfig
    submissions = "gqa"


@register_dataset("lxmert_nlvr2")
class LxmertNlvr2(LxmertTask):
    """NLVR2: whether a sentence is true of two images."""

    Config: ClassVar[type[DatasetConfig]] = LxmertNlvr2Config
    Examples = ImagePairSplit
    submissions = "nlvr2"

    @property
    def answers(self) -> list[str]:
        """The classes."""
        return ["False", "True"]

    def rank(self, logits: Tensor) -> tuple[Tensor, Sequence[str]]:
        """Return the probabilities of both classes."""
        return logits.float().softmax(-1), self.answers
