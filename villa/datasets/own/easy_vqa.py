"""easy-VQA: 5,000 small images of shapes and 48,248 questions, all in the Python package ``easy-vqa``."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np

from villa.datasets.base import DatasetConfig
from villa.datasets.epochs import check_fraction, share
from villa.datasets.own.assets import Assets
from villa.datasets.own.grid import GridExtractor
from villa.datasets.own.question_answering import QuestionAnswering, QuestionAnsweringConfig
from villa.datasets.own.readers import Kind, Record
from villa.datasets.own.split import TableSplit
from villa.datasets.stores import ImageSource, files_digest
from villa.datasets.text import build_tokenizer
from villa.errors import ConfigError, DataError, nearest
from villa.registry import register_dataset

SPLITS = ("train", "val", "test")
#: More than the words and characters of all questions.
VOCABULARY_SIZE = 512


@dataclass
class EasyVqaConfig(QuestionAnsweringConfig):
    """Options of easy-VQA, besides those that question answering shares.

    Attributes:
        regions: ``grid`` features, whole images as ``pixels``, or ``none`` for questions without their images. With a
            processor, images are taken whole.
        target: ``class``, one of the 13 answers, or ``text``, an answer that a model with a processor writes.
        val_images: training images (the last ones) that are held out, with their questions, as split ``val``.
        fraction: share of the other training questions to train on; a smaller share is part of a larger one.
        fraction_seed: of the choice of that share.
        limit: at most this many questions a split (the first ones), for quick runs.
    """

    name: str = "easy_vqa"
    max_text_length: int = 24
    regions: Literal["grid", "pixels", "none"] = "grid"
    target: Literal["class", "text"] = "class"
    val_images: int = 200
    fraction: float = 1.0
    fraction_seed: int = 0
    limit: int | None = None

    def check(self) -> None:
        """Refuse numbers that make no sense; see the base class."""
        super().check()
        check_fraction(self.fraction)
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"dataset.limit={self.limit} is not allowed; give at least 1, or null for all questions")
        if self.val_images < 0:
            raise ConfigError(f"dataset.val_images={self.val_images} is not allowed; give 0 or more")
        self.check_kind(self.kind)

    @property
    def kind(self) -> Kind:
        """What is asked of the model."""
        return "text" if self.target == "text" else "label"


@dataclass(frozen=True)
class Question:
    """One question of the package: its place in the package's list, its text, answer and image."""

    number: int
    text: str
    answer: str
    image: int


@register_dataset("easy_vqa")
class EasyVqa(QuestionAnswering):
    """easy-VQA with its official test split; ``val`` is held out from the training images."""

    Config: ClassVar[type[DatasetConfig]] = EasyVqaConfig
    config: EasyVqaConfig

    def _build_assets(self) -> Assets:
        processor, regions = self._processor(), self.config.regions
        if processor is not None and regions == "grid":
            regions = "pixels"
        return Assets(
            build_tokenizer(_distinct_texts(), VOCABULARY_SIZE) if processor is None else None,
            list(_package().get_answers()) if self.config.kind == "label" else [],
            soft=False,
            regions=regions,
            feature_dim=GridExtractor.dim if regions == "grid" else None,
            extractor=self._extractor(regions, processor),
            kind=self.config.kind,
            processor=processor,
        )

    def _training_images(self) -> tuple[list[ImageSource], list[int]]:
        return _images(test=False), list(dict.fromkeys(question.image for question in self._questions("train")))

    def split(self, name: str) -> TableSplit:
        """Return a split; features that are not cached yet are extracted first (see the base class)."""
        questions = self._questions(name)
        seen = self.vocabulary.regions != "none"
        store = self.open_store(_images(name == "test"), (q.image for q in questions)) if seen else None
        records = [self._record(question) for question in questions]
        return TableSplit(records, self.reader, store, self._left_out(name, len(records)))

    def _record(self, question: Question) -> Record:
        images = () if self.vocabulary.regions == "none" else (question.image,)
        record = Record(str(question.number), question.text, images=images)
        if self.vocabulary.kind == "text":
            return replace(record, answer=question.answer)
        return replace(record, target=self.vocabulary.labels[question.answer])

    def fingerprint(self) -> str:
        """Hash of questions, image files, options and extractor."""
        parts: list[Any] = [asdict(self.config) | {"cache_dir": None, "processor": None}, self.vocabulary.extractor]
        if self.vocabulary.processor is not None:
            parts.append(self.vocabulary.reading_fingerprint())
        for test in (False, True):
            questions = [(q.number, q.text, q.answer, q.image) for q in _read(test)]
            parts += [questions, files_digest(_images(test))]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def reference_scores(self, split: str) -> dict[str, float]:
        """Accuracy on a split of the most frequent answer of all official training questions.

        Overall (``majority``) and for each question's text (``question_only``).
        """
        train, questions = _read(test=False), self._questions(split)
        by_text: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for question in train:
            by_text[question.text][question.answer] += 1
        overall = _most_common(Counter(question.answer for question in train))
        best = {text: _most_common(answers) for text, answers in by_text.items()}
        return {
            "majority": float(np.mean([question.answer == overall for question in questions])),
            "question_only": float(np.mean([q.answer == best.get(q.text, overall) for q in questions])),
        }

    def _left_out(self, name: str, kept: int) -> list[str]:
        """Say, in a line, how many questions of a split ``fraction`` and ``limit`` leave out."""
        count, fraction, limit = len(self._whole(name)), self.config.fraction, self.config.limit
        shared = [f"dataset.fraction={fraction}"] if name == "train" and fraction < 1 else []
        options = shared if limit is None else [*shared, f"dataset.limit={limit}"]
        return [f"{', '.join(options)}: {count - kept:,} of {count:,} questions are left out"] if kept < count else []

    def _questions(self, name: str) -> list[Question]:
        questions = self._whole(name)
        if name == "train":
            questions = list(share(questions, self.config.fraction, self.config.fraction_seed))
        return questions[: self.config.limit]

    def _whole(self, name: str) -> list[Question]:
        """All questions of a split, whatever ``fraction`` and ``limit`` are."""
        if name not in SPLITS:
            raise DataError(f"easy_vqa has no split '{name}'{nearest(name, SPLITS)} (known: {', '.join(SPLITS)})")
        questions = _read(test=name == "test")
        if name == "val":
            return self._held_out(questions)
        if name == "test":
            return questions
        first = self._first_held_out()
        return [question for question in questions if question.image < first]

    def _first_held_out(self) -> int:
        images = len(_images(test=False))
        if self.config.val_images >= images:
            raise ConfigError(f"dataset.val_images={self.config.val_images} leaves none of {images} images to train on")
        return images - self.config.val_images

    def _held_out(self, questions: list[Question]) -> list[Question]:
        first = self._first_held_out()
        if not self.config.val_images:
            raise DataError("easy_vqa has no split 'val' with dataset.val_images=0; raise it, or set evaluation.split")
        return [question for question in questions if question.image >= first]


def _package() -> ModuleType:
    try:
        import easy_vqa
    except ImportError as error:
        raise DataError("dataset 'easy_vqa' needs the easy-vqa package; pip install 'villa[demo]'") from error
    module: ModuleType = easy_vqa
    return module


@cache
def _read(test: bool) -> list[Question]:
    package = _package()
    columns = package.get_test_questions() if test else package.get_train_questions()
    return [Question(number, *row) for number, row in enumerate(zip(*columns, strict=True))]


@cache
def _images(test: bool) -> list[ImageSource]:
    """Return the images; image i of the package is entry i."""
    package = _package()
    paths = package.get_test_image_paths() if test else package.get_train_image_paths()
    return [ImageSource(Path(paths[image]), "easy_vqa") for image in range(len(paths))]


def _distinct_texts() -> list[str]:
    return sorted({question.text for question in _read(test=False)})


def _most_common(answers: Counter[str]) -> str:
    return answers.most_common(1)[0][0]  # of equals the one seen first
