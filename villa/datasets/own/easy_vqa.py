"""easy-VQA: 5,000 small images of shapes and 48,248 questions, from the Python package ``easy-vqa``."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, NamedTuple

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
#: Upper bound on the words and characters of all questions.
VOCABULARY_SIZE = 512


@dataclass
class EasyVqaConfig(QuestionAnsweringConfig):
    """Options of easy-VQA.

    Attributes:
        regions: ``grid`` features, whole images as ``pixels``, or ``none`` for questions without images. With a
            processor, images are read whole.
        target: ``class``, one of the 13 answers, or ``text``, an answer that a model with a processor generates.
        val_images: number of training images (the last ones) held out, with their questions, as split ``val``.
        fraction: share of the other training questions to train on; smaller shares are subsets of larger ones.
        fraction_seed: seed of the choice of that share.
        limit: maximum number of questions per split (the first ones), for quick runs.
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
        """Check the ranges of the options."""
        super().check()
        check_fraction(self.fraction)
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"dataset.limit={self.limit} is not allowed; give at least 1, or null for all questions")
        if self.val_images < 0:
            raise ConfigError(f"dataset.val_images={self.val_images} is not allowed; give 0 or more")
        self.check_kind(self.kind)

    @property
    def kind(self) -> Kind:
        """Kind of target."""
        return "text" if self.target == "text" else "label"


class Question(NamedTuple):
    """A question: its index in the package's list, text, answer and image."""

    number: int
    text: str
    answer: str
    image: int


@register_dataset("easy_vqa")
class EasyVqa(QuestionAnswering):
    """easy-VQA with its official test split, and a ``val`` split held out from the training images."""

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
        """Return a split, after extracting features that are not cached yet."""
        questions = self._questions(name)
        seen = self.vocabulary.regions != "none"
        store = self.open_store(_images(test=name == "test"), (q.image for q in questions)) if seen else None
        records = [self._record(question) for question in questions]
        return TableSplit(records, self.reader, store, self._left_out(name, len(records)))

    def _record(self, question: Question) -> Record:
        images = () if self.vocabulary.regions == "none" else (question.image,)
        text = self.vocabulary.kind == "text"
        target = None if text else self.vocabulary.labels[question.answer]
        answer = question.answer if text else None
        return Record(str(question.number), question.text, images=images, target=target, answer=answer)

    def fingerprint(self) -> str:
        """Hash of questions, image files, options and extractor."""
        options = asdict(self.config) | {"cache_dir": None, "processor": None}
        del options["label_prompt"]  # it changes no example
        parts: list[Any] = [options, self.vocabulary.extractor]
        if self.vocabulary.processor is not None:
            parts.append(self.vocabulary.reading_fingerprint())
        for test in (False, True):
            questions = [(q.number, q.text, q.answer, q.image) for q in _read(test=test)]
            parts += [questions, files_digest(_images(test=test))]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def reference_scores(self, split: str) -> dict[str, float]:
        """Return the accuracy on a split of the most frequent answer of the official training questions.

        ``majority`` takes it over all questions, ``question_only`` over those with the same text.
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
        """Return a line on how many questions of a split ``fraction`` and ``limit`` leave out, if any."""
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
        """Return all questions of a split, regardless of ``fraction`` and ``limit``."""
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
def _read(*, test: bool) -> list[Question]:
    package = _package()
    columns = package.get_test_questions() if test else package.get_train_questions()
    return [Question(number, *row) for number, row in enumerate(zip(*columns, strict=True))]


@cache
def _images(*, test: bool) -> list[ImageSource]:
    """Return the images, ordered as in the package."""
    package = _package()
    paths = package.get_test_image_paths() if test else package.get_train_image_paths()
    return [ImageSource(Path(paths[image]), "easy_vqa") for image in range(len(paths))]


def _distinct_texts() -> list[str]:
    return sorted({question.text for question in _read(test=False)})


def _most_common(answers: Counter[str]) -> str:
    return answers.most_common(1)[0][0]  # ties: the one seen first
