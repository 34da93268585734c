"""LXMERT's tasks (VQA, GQA, NLVR2) on the files of its release: annotations as JSON, features as ``*_obj36.tsv``."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import Tokenizer
from torch import Tensor

from villa.batch import Batch
from villa.datasets.answers import best_answers, read_answers
from villa.datasets.base import DatasetConfig, Example, TaskDataset
from villa.datasets.collation import collate
from villa.datasets.database_paths import SPLITS, describe_missing
from villa.datasets.lxmert_options import (
    LxmertAnswersConfig,
    LxmertDataConfig,
    LxmertGqaConfig,
    LxmertNlvr2Config,
)
from villa.datasets.lxmert_split import AnnotatedSplit, ImagePairSplit, QuestionSplit
from villa.datasets.lxmert_synthetic import GENERATED_ANSWERS, VOCABULARY_FILE, write_lxmert
from villa.datasets.stores.tsv import TsvFile, TsvStore
from villa.datasets.synthetic import databases
from villa.datasets.text import encode, load_tokenizer, save_tokenizer, vocabulary_size
from villa.errors import DataError, MissingDataError
from villa.files import sha256, write_json
from villa.models.base import DataFacts
from villa.registry import register_dataset

_ANSWERS_FILE, _FACTS_FILE = "answers.json", "dataset.json"


class LxmertTask(TaskDataset):
    """A task of LXMERT. A subclass names the class of its splits, its answers and its submission.

    Attributes:
        Examples: makes examples of annotation files.
        submissions: the format of predictions.
    """

    Config: ClassVar[type[DatasetConfig]] = LxmertDataConfig
    config: LxmertDataConfig
    Examples: ClassVar[type[AnnotatedSplit]]
    submissions: ClassVar[str]

    def __init__(self, config: Any, assets: Path | None = None) -> None:
        super().__init__(config, assets)
        config.check()
        self._features: dict[Path, TsvFile] = {}
        self._splits: dict[str, AnnotatedSplit] = {}

    @property
    @abstractmethod
    def answers(self) -> list[str]:
        """Answers in the order of the logits."""

    def splits(self) -> tuple[str, ...]:
        """The splits that the recipe lists files for."""
        return SPLITS if self.config.synthetic else tuple(s for s in SPLITS if getattr(self.config, s))

    def split(self, name: str) -> AnnotatedSplit:
        """Return a split; every image that the annotations name is looked up first.

        With the training split come all others, so that what is wrong with them is known before training.
        """
        for wanted in (name, *(self.splits() if name == "train" else ())):
            if wanted not in self._splits:
                self._splits[wanted] = self._make(wanted)
        return self._splits[name]

    def facts(self) -> DataFacts:
        """Sizes of the vocabulary, the answers and a region feature."""
        if not self.splits():
            raise DataError(f"dataset '{self.config.name}' lists no file; set dataset.train and train_features")
        split = next(iter(self._present()), self.splits()[0])
        self._require(split)
        dim = self._store(split).dim
        if self.assets is not None and dim != self._trained_dim():
            raise DataError(
                f"the checkpoint was trained on region features {self._trained_dim()} wide, but those of the recipe "
                f"are {dim} wide; use the features of the training data"
            )
        return DataFacts(vocabulary_size(self.tokenizer), len(self.answers), dim)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, or that of ``dataset.tokenizer``."""
        return load_tokenizer(
            self.assets if self.assets is not None else self._path(self.config.tokenizer, VOCABULARY_FILE)
        )

    def encode(self, text: str) -> Tensor:
        """Return the word-piece ids of a text, ``[T]`` int64."""
        return encode(self.tokenizer, text, self.config.max_text_length)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad examples into a batch."""
        return collate(examples)

    def submission(self, split: str) -> str | None:
        """The format of the task's leaderboard."""
        return self.submissions

    def decode(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Return the best answer of every row and its sigmoid score."""
        return best_answers(logits.float().sigmoid(), self.answers)

    def save_assets(self, folder: Path) -> None:
        """Write tokenizer, answers and the width of a region feature."""
        folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(self.tokenizer, folder)
        write_json(folder / _ANSWERS_FILE, self.answers)
        write_json(folder / _FACTS_FILE, asdict(self.facts()))

    def fingerprint(self) -> str:
        """Hash of the options and of the splits that are there (to test, the one to train on need not be)."""
        parts: list[Any] = [asdict(self.config) | {"root": None}, self.answers]
        parts.append(hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest())
        for name in self._present():
            parts.append([name, *map(sha256, self._files(name)), *(f.fingerprint() for f in self._store(name).files)])
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _make(self, name: str) -> AnnotatedSplit:
        if name not in self.splits():
            raise DataError(f"dataset '{self.config.name}' has no split '{name}'; list files in dataset.{name}")
        self._require(name)
        labels = {answer: label for label, answer in enumerate(self.answers)}
        return self.Examples(self._files(name), self._store(name), self.encode, labels)

    @cached_property
    def _root(self) -> Path:
        if self.config.synthetic:
            return databases(self.config.name, self.config.synthetic_examples, write_lxmert)
        return Path(self.config.root).expanduser()

    def _path(self, name: str, generated: str) -> Path:
        """Return the path of a file below the root, or that of the generated one."""
        return self._root / (generated if self.config.synthetic else name)

    def _files(self, split: str, kind: str = "") -> list[Path]:
        """Return the annotation files of a split, or with ``"_features"`` its feature files."""
        if self.config.synthetic:
            return [self._root / (f"{split}_obj36.tsv" if kind else f"{split}.json")]
        return [self._root / name for name in getattr(self.config, split + kind)]

    def _store(self, split: str) -> TsvStore:
        for path in self._files(split, "_features"):
            if path not in self._features:
                self._features[path] = TsvFile(path)
        return TsvStore([self._features[path] for path in self._files(split, "_features")])

    def _needed(self, split: str) -> Iterator[tuple[Path, str]]:
        """Yield the files of a split, each with what it should be."""
        yield from ((path, "annotations: JSON list of records") for path in self._files(split))
        features = "region features: lines of img_id, img_h, ..., boxes, features"
        yield from ((path, features) for path in self._files(split, "_features"))

    def _shared(self) -> Iterator[tuple[Path, str]]:
        """Yield the files that a checkpoint's assets replace, each with what it should be."""
        yield self._path(self.config.tokenizer, VOCABULARY_FILE), "tokenizer: vocab.txt of bert-base-uncased"

    def _present(self) -> list[str]:
        return [split for split in self.splits() if not _missing(self._needed(split))]

    def _require(self, split: str) -> None:
        """Make sure that the files of a split are there; if they are not, all that is missing is named."""
        shared = [] if self.assets is not None else _missing(self._shared())
        if shared or _missing(self._needed(split)):
            missing = shared + [entry for name in self.splits() for entry in _missing(self._needed(name))]
            raise MissingDataError(describe_missing(self.config.name, self.config.root, missing, "docs/lxmert.md"))

    def _trained_dim(self) -> int:
        assert self.assets is not None
        try:
            return int(json.loads((self.assets / _FACTS_FILE).read_text(encoding="utf-8"))["feature_dim"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"cannot read '{self.assets / _FACTS_FILE}'; use a checkpoint with its assets") from error


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
            self.assets / _ANSWERS_FILE
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
    """NLVR2: is a sentence true of two images?"""

    Config: ClassVar[type[DatasetConfig]] = LxmertNlvr2Config
    Examples = ImagePairSplit
    submissions = "nlvr2"

    @property
    def answers(self) -> list[str]:
        """The classes."""
        return ["False", "True"]

    def decode(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Return ``True`` or ``False`` and its probability."""
        return best_answers(logits.float().softmax(-1), self.answers)
