"""A user's own questions in JSON lines, tables, archives or folders, on images, feature files, or text alone."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

from tokenizers import Tokenizer

from villa.config.options import TEXTS
from villa.config.variants import Overlay
from villa.datasets.base import DatasetConfig, read_answer_list
from villa.datasets.epochs import check_counts
from villa.datasets.own.assets import Assets
from villa.datasets.own.files import FileStore
from villa.datasets.own.grid import GridExtractor
from villa.datasets.own.question_answering import QuestionAnswering, QuestionAnsweringConfig, ranked_answers
from villa.datasets.own.readers import Kind
from villa.datasets.own.records import (
    JsonLines,
    Regions,
    guess_regions,
    record_files,
    scores_of,
    texts_of,
)
from villa.datasets.own.split import JsonlSplit
from villa.datasets.sources.fields import check_columns
from villa.datasets.sources.opening import Source, open_source, split_sources
from villa.datasets.stores import ImageSource, SourceFiles, Sources, files_digest
from villa.datasets.synthetic import EXAMPLES, databases
from villa.datasets.synthetic.pictures import SMALL_PICTURES, write_pictures
from villa.datasets.text import Texts, build_tokenizer, load_tokenizer
from villa.errors import ConfigError, DataError, about, nearest
from villa.files import local_path
from villa.registry import register_dataset

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
#: Options left out of the fingerprint, which covers the generated files.
_SYNTHETIC = ("synthetic", "synthetic_lines", "synthetic_examples")
#: Options left out of it, too, which covers the rows that they choose.
_ROWS = ("source", "columns", "question", "max_rows", "streaming")


@dataclass
class JsonlConfig(QuestionAnsweringConfig):
    """Options of a user's own data.

    Files hold JSON lines, or are CSV, TSV, parquet, Arrow or tar: docs/data_sources.md.

    A line is ``{"question": text, "answer": text, "image": path, "id": text}``. Instead of ``image``, ``features``
    names a ``.npz`` or ``.safetensors`` file, or ``images`` lists several paths; without any, questions are text only.
    ``text`` is another name for ``question``; ``text_pair`` is a second text. Instead of ``answer``, ``answers`` is
    ``{text: score}`` or a list of human answers. The default ``id`` is the line number. ``group`` (a name) and
    ``subsets`` (a list of names) are for metrics of these.

    Attributes:
        train: training questions, optional if a checkpoint is only evaluated: a file, a pattern (``train-*.parquet``),
            a folder of files or images, a data set of the hub (``hf://OWNER/NAME#train``), or a list of these.
        val: validation questions.
        test: test questions, with or without answers.
        source: folder, or data set of the hub (``hf://OWNER/NAME``), with the splits, which ``train``, ``val`` and
            ``test`` then name; by default they have the usual names.
        columns: name of a column by field: ``{image: picture, question: q, answer: label}``; by default each field is
            the column of its name. ``image_base64`` is a field of images as text.
        question: question of records without one, as in the classification of images.
        max_rows: number of rows of each split to read from the beginning; None for all.
        streaming: read data of the hub as they arrive, without downloading the files first.
        image_root: folder that paths in the files are relative to; None for the folder of each file.
        answers: file with one answer per line, in the order of the labels, or a ``.json`` file with a list or
            ``{answer: label}``; None takes the answers of ``train``.
        max_answers: number of the most frequent answers of ``train`` to keep.
        min_count: minimum number of questions of ``train`` with an answer for it to be kept.
        tokenizer: ``tokenizer.json``, ``vocab.txt`` or folder; None builds one from the questions of ``train``.
        vocabulary_size: maximum size of a vocabulary that is built.
        regions: ``grid`` of ``image``, ``files`` named by ``features``, whole images as ``pixels``, or ``none``;
            ``auto`` decides by the first question, and reads images whole if there is a processor.
        target: ``class``, one answer (the best-scored), or ``soft``, scores of all answers; ``auto`` is soft if the
            first question of ``train`` has ``answers``. With a processor also ``text``, an answer to generate, or
            ``pair``, matching images and texts.
        synthetic: try the recipe with a tiny model on generated pictures.
        synthetic_lines: generated lines: ``questions`` about a picture, ``sentences`` about two, or ``captions``;
            ``auto`` takes captions for the target ``pair``, else questions.
        synthetic_examples: training lines to generate; evaluation splits get a quarter of them.
        allow_empty_boxes: accept boxes without width or height in feature files.
    """

    OVERLAYS: ClassVar[tuple[Overlay, ...]] = SMALL_PICTURES

    name: str = "jsonl"
    train: Any = field(default=None, metadata=TEXTS)
    val: Any = field(default=None, metadata=TEXTS)
    test: Any = field(default=None, metadata=TEXTS)
    source: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    question: str | None = None
    max_rows: int | None = None
    streaming: bool = False
    image_root: str | None = None
    answers: str | None = None
    max_answers: int | None = None
    min_count: int = 1
    tokenizer: str | None = None
    vocabulary_size: int = 8192
    regions: Literal["auto", "grid", "files", "pixels", "none"] = "auto"
    target: Literal["auto", "class", "soft", "text", "pair"] = "auto"
    synthetic: bool = False
    synthetic_lines: Literal["auto", "questions", "sentences", "captions"] = "auto"
    synthetic_examples: int = EXAMPLES
    allow_empty_boxes: bool = False

    def objectives(self) -> dict[str, float]:
        """Return the contrastive objective for pairs, else none."""
        return {"contrastive": 1.0} if self.kind == "pair" else {}

    def check(self) -> None:
        """Check the ranges and combinations of the options."""
        super().check()
        for name in SPLITS:
            _check_place(name, getattr(self, name))
        check_columns(self.columns)
        if self.question is not None and not self.question.strip():
            raise ConfigError("dataset.question is empty; give a text, or leave it out")
        check_counts(self, ("max_answers", "min_count", "max_rows", "vocabulary_size"))
        if self.synthetic_examples < 32:
            raise ConfigError(f"dataset.synthetic_examples={self.synthetic_examples} is too small; give at least 32")
        self.check_kind(self.kind)
        if self.processor is not None and (self.tokenizer is not None or self.regions in ("grid", "files")):
            other = "tokenizer" if self.tokenizer is not None else f"regions={self.regions}"
            raise ConfigError(f"dataset.processor reads texts and whole images; leave out dataset.{other}")

    @property
    def kind(self) -> Kind:
        """Kind of target."""
        return self.target if self.target in ("text", "pair") else "label"


@register_dataset("jsonl")
class Jsonl(QuestionAnswering):
    """A user's own questions and answers.

    Training questions without an answer among the labels are left out, and their number is logged. In other splits
    they count as wrong with soft targets, and are refused with class targets.
    """

    Config: ClassVar[type[DatasetConfig]] = JsonlConfig
    config: JsonlConfig

    def __init__(self, config: Any, assets: Path | None = None) -> None:
        super().__init__(config, assets)
        self._referred: dict[str, SourceFiles] = {}  # files referred to by the lines of each split read so far

    def splits(self) -> tuple[str, ...]:
        """Return the splits that a file is given for."""
        return tuple(name for name in SPLITS if self._place(name) is not None)

    def split(self, name: str) -> JsonlSplit:
        """Return a split, after checking every line and extracting features that are not cached yet."""
        lines = self._train if name == "train" else self._lines(name)
        split = JsonlSplit(lines, self.vocabulary, self.reader, train=name == "train")
        files = split.read_index(lines.folder)
        split.store = self.open_store(files) if files else None
        if len(split) == len(lines) or self.vocabulary.regions == "none":
            self._referred[name] = files
        return split

    def fingerprint(self) -> str:
        """Hash of the files, the names and sizes of files they refer to, the options and the extractor."""
        options = asdict(self.config)
        for place in (
            "cache_dir",
            "image_root",
            *SPLITS,
            "answers",
            "tokenizer",
            "processor",
            "label_prompt",
            *_SYNTHETIC,
            *_ROWS,
            "allow_empty_boxes",
        ):
            options.pop(place)
        parts: list[object] = [options, self.vocabulary.extractor, self.vocabulary.answers]
        parts.append(self.vocabulary.reading_fingerprint())
        for name in SPLITS:
            if self._place(name) is not None:
                lines, files = self._lines(name), self._referred.get(name)
                parts.append([name, lines.digest(), files_digest(self._files(lines) if files is None else files)])
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _build_assets(self) -> Assets:
        first, kind, processor = self._train[0], self.config.kind, self._processor()
        regions = self._regions(first)
        if kind == "pair" and regions == "none":
            raise DataError(
                f"{self._train.where(0)}: dataset.target=pair needs an image beside every text; add 'image'"
            )
        tokenizer, answers = self._tokenizer_and_answers(tokenizer=processor is None, answers=kind == "label")
        first_files = self._first_files() if regions == "files" else None
        return Assets(
            tokenizer,
            answers,
            soft="answers" in first if self.config.target == "auto" else self.config.target == "soft",
            regions=regions,
            feature_dim=_feature_dim(regions, first_files),
            extractor=self._extractor(regions, processor) if first_files is None else first_files.extractor,
            maker=None if first_files is None else first_files.maker,
            kind=kind,
            processor=processor,
        )

    def _regions(self, first: Mapping[str, Any]) -> Regions:
        """Return the source of regions for records like the first one."""
        if self.config.regions != "auto":
            return self.config.regions
        guessed = guess_regions(first)
        if self.config.processor is None:
            return guessed
        if guessed == "files":
            raise DataError(f"{self._train.where(0)}: dataset.processor reads images, not features; give 'image'")
        return "pixels" if guessed == "grid" else guessed

    def _training_images(self) -> tuple[SourceFiles, range]:
        files = self._files(self._train)
        return files, range(len(files))

    @cached_property
    def _train(self) -> JsonLines:
        return self._lines("train")

    def _lines(self, name: str) -> JsonLines:
        if name not in SPLITS:
            raise DataError(f"jsonl has no split '{name}'{nearest(name, SPLITS)} (known: {', '.join(SPLITS)})")
        place, config = self._place(name), self.config
        if place is None:
            raise DataError(f"jsonl has no file for split '{name}'; set dataset.{name}=path/to/questions.jsonl")
        return open_source(
            place,
            config.columns,
            question=config.question,
            images=config.regions != "none",
            root=None if config.image_root is None else local_path(config.image_root),
            cache_dir=config.cache_dir,
            max_rows=config.max_rows,
            streaming=config.streaming,
        )

    @cached_property
    def _sources(self) -> Mapping[str, Source]:
        names = {split: getattr(self.config, split) for split in SPLITS}
        if self.config.source is not None:
            return split_sources(self.config.source, names)
        return {
            split: place if isinstance(place, list) else str(place)
            for split, place in names.items()
            if place is not None
        }

    def _place(self, split: str) -> Source | None:
        """Return the file or files of a split, or None."""
        if not self.config.synthetic:
            return self._sources.get(split)
        lines = self.config.synthetic_lines
        task = ("captions" if self.config.kind == "pair" else "questions") if lines == "auto" else lines
        made = databases(f"jsonl_{task}", self.config.synthetic_examples, partial(_write_pictures, task))
        return str(made / f"{split}.jsonl")

    def _feature_files(self, sources: Sequence[ImageSource]) -> FileStore:
        return FileStore(sources, allow_empty_boxes=self.config.allow_empty_boxes)

    def _request_folder(self) -> Path:
        return Path() if self.config.image_root is None else local_path(self.config.image_root)

    def _files(self, lines: JsonLines) -> SourceFiles:
        """Return the distinct files that lines refer to."""
        sources = Sources(lines.folder, lines.where)
        for index, record in enumerate(lines):
            with about(lines.where(index)):
                names = record_files(record, self.vocabulary.regions)
            for name in names:
                sources.add(name, index)
        return sources.build()

    def _tokenizer_and_answers(self, *, tokenizer: bool, answers: bool) -> tuple[Tokenizer | None, list[str]]:
        """Load them, or build those that are wanted from a single pass over the training lines."""
        place, listed = self.config.tokenizer, self.config.answers
        loaded = load_tokenizer(local_path(place)) if tokenizer and place is not None else None
        known = read_answer_list(local_path(listed)) if answers and listed is not None else []
        build, count = tokenizer and place is None, answers and listed is None
        counts: Counter[str] = Counter()
        texts = self._training_texts(counts if count else None)
        if build:
            loaded = build_tokenizer(texts, self.config.vocabulary_size)
        if not count:
            return loaded, known
        for _ in texts:  # count the answers of lines that the tokenizer did not read
            pass
        known = ranked_answers(counts, self.config.max_answers, self.config.min_count)
        if not known:
            raise DataError(
                f"'{self._train.name}' gives no answer; add 'answer' to its lines or lower dataset.min_count"
            )
        return loaded, known

    def _training_texts(self, counts: Counter[str] | None) -> Iterator[str]:
        """Yield the texts of the training lines, and count the answers on the way."""
        for _, (scores, texts) in self._train.read(partial(_scores_and_texts, scored=counts is not None)):
            if counts is not None:
                counts.update(chain.from_iterable(answers for answers in scores if answers is not None))
            yield from (text for pair in texts for text in pair if text is not None)

    def _first_files(self) -> FileStore:
        """Return the feature files of the first training record."""
        sources = Sources(self._train.folder, self._train.where)
        with about(self._train.where(0)):
            names = record_files(self._train[0], "files")
        for name in names:
            sources.add(name, 0)
        return self._feature_files(sources.build())


def _check_place(split: str, place: Any) -> None:
    several = place if isinstance(place, list) else [place]
    if place is not None and (
        not several or isinstance(place, dict) or not all(isinstance(one, str | int) for one in several)
    ):
        raise ConfigError(f"dataset.{split}={place!r:.60} is no path; give one, or a list of paths")


def _feature_dim(regions: Regions, files: FileStore | None) -> int | None:
    if files is not None:
        return files.dim
    return GridExtractor.dim if regions == "grid" else None


def _write_pictures(task: str, _: str, examples: int, root: Path) -> None:
    write_pictures(task, examples, root)


def _scores_and_texts(
    _: int, records: Sequence[Mapping[str, Any]], *, scored: bool
) -> tuple[list[dict[str, float] | None], list[Texts]]:
    return scores_of(records) if scored else [], texts_of(records)
