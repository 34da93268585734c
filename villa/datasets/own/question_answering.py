"""The base of question-answering data sets: assets, requests and decoding of answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from villa.batch import Batch
from villa.datasets.base import DatasetConfig, Example, TaskDataset, best_answers
from villa.datasets.own.assets import Assets
from villa.datasets.own.files import FileStore
from villa.datasets.own.grid import GridExtractor, GridOptions, GridStore
from villa.datasets.own.pictures import check_background
from villa.datasets.own.processors import load_processor
from villa.datasets.own.readers import (
    SIDE,
    Kind,
    PixelReader,
    ProcessorReader,
    Reader,
    Reading,
    Record,
    RegionReader,
    WordPieces,
)
from villa.datasets.own.records import Regions, Request, record_files, record_id, record_texts
from villa.datasets.own.split import TableSplit
from villa.datasets.signatures import check_signatures
from villa.datasets.stores import (
    SAMPLE,
    STATISTICS_FILE,
    ImageSource,
    RegionStore,
    ScaledStore,
    Scaling,
    Sources,
    scaled_reading,
)
from villa.datasets.text import SHORTEST
from villa.errors import ConfigError, DataError, about
from villa.facts import DataFacts, Written
from villa.files import local_path

#: Place of a label in ``label_prompt``.
LABEL = "{label}"


@dataclass
class QuestionAnsweringConfig(GridOptions, DatasetConfig):
    """Options shared by question-answering data sets.

    Attributes:
        max_text_length: number of tokens that a text (or pair) is truncated to, special tokens included. Prompts for
            generation and texts with image placeholders are never truncated: the processor's tokenizer limits them.
        standardize: centre and scale every dimension of the region features by its statistics over training images.
        processor: folder, or name on the hub, of a transformers model whose tokenizer and image processor read texts
            and images; None builds or loads a tokenizer of the data set's own.
        padding: padding of a processor's texts: to the ``longest`` of a batch, or always to ``max_length``, that is
            max_text_length (as SigLIP was trained, with 64).
        prompt: prompt for a model with a processor, with ``{question}``, and optionally ``{image}`` where the images go
            (by default in front); None is the question alone. The processor's chat template is applied to it.
        label_prompt: text of a label for a dual encoder, with ``{label}``, such as ``a photo of a {label}``. The model
            then scores images against the texts of all labels, and does not read the questions.
    """

    max_text_length: int = 60
    standardize: bool = False
    processor: str | None = None
    padding: Literal["longest", "max_length"] = "longest"
    prompt: str | None = None
    label_prompt: str | None = None

    def check(self) -> None:
        """Check the ranges of the options.

        Raises:
            ConfigError: naming the option.
        """
        if self.max_text_length < SHORTEST:
            raise ConfigError(f"dataset.max_text_length={self.max_text_length} is too small; give at least {SHORTEST}")
        if self.prompt is not None and "{question}" not in self.prompt:
            raise ConfigError(f"dataset.prompt='{self.prompt}' has no place for the question; write {{question}} in it")
        if self.label_prompt is not None and LABEL not in self.label_prompt:
            raise ConfigError(
                f"dataset.label_prompt='{self.label_prompt}' has no place for the label; write {LABEL} in it"
            )
        if self.image_size is not None and (self.image_size < 1 or self.processor is not None):
            why = "give at least 1" if self.image_size < 1 else "the processor has a size of its own; leave one out"
            raise ConfigError(f"dataset.image_size={self.image_size} is not allowed; {why}")
        check_background(self.background)

    def check_kind(self, kind: Kind) -> None:
        """Refuse targets that need a processor, and processor options that have no effect.

        Raises:
            ConfigError: naming the option.
        """
        if kind != "label" and self.processor is None:
            raise ConfigError(
                f"dataset.target={kind} needs a model's own processor; set dataset.processor to its folder, or to its "
                "name on the hub"
            )
        without = "without dataset.processor" if self.processor is None else f"with dataset.target={kind}"
        if self.padding != "longest" and (self.processor is None or kind == "text"):
            raise ConfigError(f"dataset.padding={self.padding} has no effect {without}; leave it out")
        if self.prompt is not None and (self.processor is None or kind == "pair"):
            raise ConfigError(f"dataset.prompt has no effect {without}; leave it out")
        if self.label_prompt is not None and (self.processor is None or kind != "label"):
            raise ConfigError(f"dataset.label_prompt has no effect {without}; leave it out")


class QuestionAnswering(TaskDataset):
    """Questions on images, or text only, with their answers. Subclasses build the assets and read the splits."""

    Config: ClassVar[type[DatasetConfig]] = QuestionAnsweringConfig

    def __init__(self, config: Any, assets: Path | None = None) -> None:
        super().__init__(config, assets)
        config.check()
        self._carried: Scaling | None = None

    @cached_property
    def vocabulary(self) -> Assets:
        """Tokenizer, answers and kind of regions: from the checkpoint's assets, or built from the data."""
        if self.assets is None:
            return self._build_assets()
        loaded = Assets.load(self.assets)
        if not self.config.standardize and (self.assets / STATISTICS_FILE).is_file():
            raise DataError(
                "the checkpoint was trained on standardised region features; set dataset.standardize=true, too"
            )
        extractor = self._extractor(loaded.regions, loaded.processor)
        if loaded.regions != "files" and extractor != loaded.extractor:
            raise DataError(
                f"the checkpoint was trained on features of '{loaded.extractor}', but the configuration makes those of "
                f"'{extractor}'; set dataset.grid and dataset.image_size as in training"
            )
        return loaded

    @cached_property
    def scaling(self) -> Scaling | None:
        """Statistics of the region features: from the checkpoint's assets, or of training images."""
        if not self.config.standardize or self.vocabulary.regions in ("none", "pixels"):
            return None
        if self.assets is not None:
            return Scaling.load(self.assets)
        if self._carried is not None:
            return self._carried
        sources, indices = self._training_images()
        store, sample = self._plain_store(sources), list(islice(indices, SAMPLE))
        store.prepare(sample)
        return Scaling.fit(store, sample)

    def carry(self, assets: Path) -> str | None:
        """Adopt the statistics of region features that the weights were trained with."""
        if not (self.config.standardize and (assets / STATISTICS_FILE).is_file()):
            return None
        found = Scaling.load(assets)
        if len(found.mean) != self.vocabulary.feature_dim:
            return None
        self._carried = found
        return "region features are standardised by the statistics of the checkpoint"

    @abstractmethod
    def _build_assets(self) -> Assets:
        """Build the assets from the training data and the configuration."""

    @abstractmethod
    def _training_images(self) -> tuple[Sequence[ImageSource], Iterable[int]]:
        """Return image files, and the indices of training images among them."""

    def facts(self) -> DataFacts:
        """Return the vocabulary, the answers, the feature width and the task."""
        facts = self.vocabulary.facts()
        if self.config.label_prompt is not None and isinstance(self.reader, ProcessorReader):
            texts = [self.config.label_prompt.replace(LABEL, label) for label in self.vocabulary.answers]
            facts = replace(facts, label_texts=self.reader.token_ids(texts))
        if self.vocabulary.regions in ("none", "pixels"):
            return facts
        return replace(facts, reading={**facts.reading, **scaled_reading(self.config.standardize)})

    @cached_property
    def reader(self) -> Reader:
        """The reader that makes examples of texts and images, and batches of examples."""
        vocabulary, config = self.vocabulary, self.config
        if vocabulary.processor is not None:
            reading = Reading(vocabulary.kind, config.max_text_length, config.padding, config.prompt, config.background)
            return ProcessorReader(vocabulary.processor, reading)
        assert vocabulary.tokenizer is not None
        words = WordPieces(vocabulary.tokenizer, config.max_text_length)
        if vocabulary.regions == "pixels":
            return PixelReader(words, self._side(), config.background)
        return RegionReader(words, self._open_store)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad examples into a batch."""
        return self.reader.collate(examples)

    def save_assets(self, folder: Path) -> None:
        """Write tokenizer, answers, a description of the regions, and their statistics."""
        self.vocabulary.save(folder)
        if self.scaling is not None:
            self.scaling.save(folder)

    def requests(self, records: Sequence[Mapping[str, Any]]) -> TableSplit:
        """Return records as examples to predict."""
        rows: list[Record] = []
        places: list[str] = []
        sources = Sources(self._request_folder(), places.__getitem__)
        for number, record in enumerate(records, start=1):
            place = record.where if isinstance(record, Request) else ""
            where = place or f"record {record.get('id', number)}"
            places.append(where)
            with about(where):
                files = record_files(record, self.vocabulary.regions)
                name, texts = record_id(record, str(number)), record_texts(record)
            images = tuple(sources.add(file, number - 1) for file in files)
            rows.append(Record(name, *texts, images, where=place))
        store = self.open_store(sources.build())
        return TableSplit(rows, self.reader, store)

    def image_files(self, record: Mapping[str, Any], where: str = "") -> Sequence[ImageSource]:
        """Return the images that a record to predict on names, also where the model reads their features.

        Raises:
            DataError: the record does not name them.
        """
        regions = self.vocabulary.regions
        sources = Sources(self._request_folder(), lambda _: where)
        for name in record_files(record, "grid" if regions == "files" else regions):
            sources.add(name, 0)
        return sources.build()

    def request(self, record: Mapping[str, Any], images: Any) -> Example:
        """Return a record to predict on as an example.

        Args:
            record: a record with an ``id``.
            images: store of its images, or of their region features; None for text only.

        Raises:
            DataError: a text cannot be read.
        """
        if isinstance(images, RegionStore) and self.scaling is not None:
            images = ScaledStore(images, self.scaling)
        numbers = () if images is None else tuple(range(len(images)))
        return self.reader.example(Record(str(record["id"]), *record_texts(record), numbers), images)

    def open_store(self, sources: Sequence[ImageSource], images: Iterable[int] | None = None) -> Any:
        """Return the reader's store of files, with ``images`` (by default all) prepared."""
        store = self.reader.open(sources)
        if isinstance(store, RegionStore):
            store.prepare(range(len(store)) if images is None else images)
            trained = ("the training data", self.vocabulary.extractor)
            check_signatures([trained, (sources[0].path.parent, store.extractor)])
        return store

    def decode(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Return the best answer of every row and its probability (for soft targets, its sigmoid score).

        For pairs, ``logits [B]`` are those of each image with its own text, and are returned as scores.
        """
        ranked = self.rank(logits)
        if ranked is None:
            return [{"answer": "match", "score": score} for score in logits.float().tolist()]
        return best_answers(*ranked)

    def rank(self, logits: Tensor) -> tuple[Tensor, Sequence[str]] | None:
        """Return the probabilities of all answers (for soft targets, their sigmoid scores); None for pairs."""
        if self.vocabulary.kind != "label":
            return None
        scores = logits.float().sigmoid() if self.vocabulary.soft else logits.float().softmax(-1)
        return scores, self.vocabulary.answers

    def decode_written(self, written: Written, batch: Batch) -> list[dict[str, Any]]:
        """Return the generated texts and their probabilities."""
        tokenizer = getattr(self.vocabulary.processor, "tokenizer", self.vocabulary.processor)
        rows = [row[row >= 0].tolist() for row in written.tokens]
        texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
        return [{"answer": text, "score": score} for text, score in zip(texts, written.scores.tolist(), strict=True)]

    def _request_folder(self) -> Path:
        """Return the folder that a request's paths are relative to."""
        return Path()

    def _open_store(self, sources: Sequence[ImageSource]) -> RegionStore | None:
        """Return the region features of these files, or None for text only."""
        if self.vocabulary.regions == "none" or not sources:
            return None
        store = self._plain_store(sources)
        return store if self.scaling is None else ScaledStore(store, self.scaling)

    def _plain_store(self, sources: Sequence[ImageSource]) -> RegionStore:
        regions = self.vocabulary.regions
        store: RegionStore = GridStore(sources, self.config) if regions == "grid" else self._feature_files(sources)
        if store.dim != self.vocabulary.feature_dim:
            raise DataError(
                f"{sources[0].place}features are {store.dim} wide, in training they were "
                f"{self.vocabulary.feature_dim}: another detector made them"
            )
        return store

    def _feature_files(self, sources: Sequence[ImageSource]) -> RegionStore:
        """Return the store of feature files."""
        return FileStore(sources)

    def _processor(self) -> Any:
        """Load the recipe's processor, or return None if it names none."""
        return None if self.config.processor is None else load_processor(str(local_path(self.config.processor)))

    def _side(self) -> int:
        size: int | None = self.config.image_size
        return SIDE if size is None else size

    def _extractor(self, regions: Regions, processor: Any = None) -> str | None:
        """Return the description of the configured extractor of grid features, or of images of one size."""
        if regions == "pixels" and processor is None:
            return f"whole images of {self._side()} pixels a side"
        return GridExtractor(self.config).signature if regions == "grid" else None


def ranked_answers(counts: Mapping[str, int], most: int | None, least: int) -> list[str]:
    """Return the ``most`` frequent answers among those that occur at least ``least`` times, most frequent first."""
    kept: Iterable[str] = (answer for answer, count in counts.items() if count >= least)
    return sorted(kept, key=lambda answer: (-counts[answer], answer))[:most]
