"""Options of LXMERT's tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from villa.config.overlays import Overlay
from villa.datasets.database_paths import SPLITS
from villa.datasets.lxmert_synthetic import SMALL_LXMERT
from villa.datasets.released_files import ReleasedFilesConfig
from villa.datasets.text import SHORTEST
from villa.errors import ConfigError


@dataclass
class LxmertDataConfig(ReleasedFilesConfig):
    """Options that LXMERT's tasks share; relative paths are below ``root``.

    Attributes:
        train: annotation files to train on.
        train_features: feature files with their images.
        val: annotation files to validate on.
        val_features: feature files with their images.
        test: annotation files to test on.
        test_features: feature files with their images.
        tokenizer: ``vocab.txt`` of bert-base-uncased, or another tokenizer's file or folder.
        max_text_length: word-pieces of a text with [CLS] and [SEP]; longer ones are cut.
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
        """Refuse options that do not go together; see the base class."""
        super().check()
        for split in SPLITS:
            if bool(getattr(self, split)) != bool(getattr(self, f"{split}_features")):
                raise ConfigError(f"dataset.{split} and dataset.{split}_features go together; list files in both")
        if self.max_text_length < SHORTEST:
            raise ConfigError(f"dataset.max_text_length={self.max_text_length} is too small; give at least {SHORTEST}")


@dataclass
class LxmertAnswersConfig(LxmertDataConfig):
    """Options of LXMERT's question answering, besides those that its tasks share.

    Attributes:
        answers: JSON file with the label of every answer (the released ``trainval_ans2label.json``), below ``root``.
    """

    name: str = "lxmert_vqa"
    answers: str = "lxmert/vqa/trainval_ans2label.json"


@dataclass
class LxmertGqaConfig(LxmertAnswersConfig):
    """Options of GQA: those of LXMERT's question answering."""

    name: str = "lxmert_gqa"
    answers: str = "lxmert/gqa/trainval_ans2label.json"


@dataclass
class LxmertNlvr2Config(LxmertDataConfig):
    """Options of NLVR2: those that LXMERT's tasks share."""

    name: str = "lxmert_nlvr2"
