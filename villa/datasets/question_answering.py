"""What question-answering data sets share: assets, requests and answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from villa.batch import Batch
from villa.datasets.answers import best_answers
from villa.datasets.assets import Assets
from villa.datasets.base import DatasetConfig, Example, TaskDataset
from villa.datasets.collation import collate
from villa.datasets.records import Regions, region_source, text_field
from villa.datasets.stores.base import RegionStore, Source, Sources
from villa.datasets.stores.files import FileStore
from villa.datasets.stores.grid import GridExtractor, GridOptions
from villa.datasets.stores.grid_store import GridStore
from villa.datasets.stores.scaled import SAMPLE, ScaledStore, Scaling
from villa.datasets.table import Row, TableSplit
from villa.datasets.text import SHORTEST, encode
from villa.errors import ConfigError, DataError
from villa.models.base import DataFacts


@dataclass
class QuestionAnsweringConfig(GridOptions, DatasetConfig):
    """Options that question-answering data sets share, besides those of grid features.

    Attributes:
        max_text_length: word-pieces of a question with [CLS] and [SEP]; longer ones are cut.
        standardize: centre and scale every dimension of the region features by its statistics over training images.
    """

    max_text_length: int = 60
    standardize: bool = False

    def check(self) -> None:
        """Refuse numbers that make no sense.

        Raises:
            ConfigError: naming the option.
        """
        if self.max_text_length < SHORTEST:
            raise ConfigError(f"dataset.max_text_length={self.max_text_length} is too small; give at least {SHORTEST}")


class QuestionAnswering(TaskDataset):
    """Questions about an image (or text alone) with answers from a fixed list.

    A subclass builds the assets and reads its splits.
    """

    Config: ClassVar[type[DatasetConfig]] = QuestionAnsweringConfig

    def __init__(self, config: Any, assets: Path | None = None) -> None:
        super().__init__(config, assets)
        config.check()

    @cached_property
    def vocabulary(self) -> Assets:
        """Tokenizer, answers and kind of regions: from the checkpoint's assets, or built from the data."""
        if self.assets is None:
            return self._build_assets()
        loaded = Assets.load(self.assets)
        extractor = self._extractor(loaded.regions)
        if extractor != loaded.extractor:
            raise DataError(
                f"the checkpoint was trained on features of '{loaded.extractor}', but the configuration makes those of "
                f"'{extractor}'; set dataset.grid and dataset.image_size as in training"
            )
        return loaded

    @cached_property
    def scaling(self) -> Scaling | None:
        """Statistics of the region features: from the checkpoint's assets, or of training images."""
        if not self.config.standardize or self.vocabulary.regions == "none":
            return None
        if self.assets is not None:
            return Scaling.load(self.assets)
        sources, indices = self._training_images()
        store, sample = self._plain_store(sources), list(islice(indices, SAMPLE))
        store.prepare(sample)
        return Scaling.fit(store, sample)

    @abstractmethod
    def _build_assets(self) -> Assets:
        """Build the assets from the training data and the configuration."""

    @abstractmethod
    def _training_images(self) -> tuple[Sequence[Source], Iterable[int]]:
        """Return files, and the indices of training images among them."""

    def facts(self) -> DataFacts:
        """Sizes of the vocabulary, the answers and a region feature."""
        return self.vocabulary.facts()

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad examples into a batch."""
        return collate(examples)

    def save_assets(self, folder: Path) -> None:
        """Write tokenizer, answers and a description of the regions."""
        self.vocabulary.save(folder)
        if self.scaling is not None:
            self.scaling.save(folder)

    def encode(self, text: str) -> Tensor:
        """Return the word-piece ids of a question, ``[T]`` int64."""
        return encode(self.vocabulary.tokenizer, text, self.config.max_text_length)

    def requests(self, records: Sequence[Mapping[str, Any]]) -> TableSplit:
        """Turn records into questions without answers; see the base class."""
        rows: list[Row] = []
        texts: list[Tensor] = []
        sources = Sources()
        for number, record in enumerate(records, start=1):
            where = f"record {number}"
            texts.append(self.encode(text_field(record, "question", where)))
            source = region_source(record, self.vocabulary.regions, self._request_folder(), where)
            rows.append(Row(str(record.get("id", number)), len(rows), sources.add(source) if source else 0))
        store = self._open_store(sources.files)
        if store is not None:
            store.prepare(range(len(store)))
        return TableSplit(rows, texts, store)

    def decode(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Return the best answer of every row and its probability (soft targets: its sigmoid score)."""
        scores = logits.float().sigmoid() if self.vocabulary.soft else logits.float().softmax(-1)
        return best_answers(scores, self.vocabulary.answers)

    def _request_folder(self) -> Path:
        """Return the folder that a request's paths are relative to."""
        return Path()

    def _open_store(self, sources: Sequence[Source]) -> RegionStore | None:
        """Return the store of region features of these files, or None for text only."""
        if self.vocabulary.regions == "none" or not sources:
            return None
        store = self._plain_store(sources)
        return store if self.scaling is None else ScaledStore(store, self.scaling)

    def _plain_store(self, sources: Sequence[Source]) -> RegionStore:
        regions = self.vocabulary.regions
        store: RegionStore = GridStore(sources, self.config) if regions == "grid" else FileStore(sources)
        if store.dim != self.vocabulary.feature_dim:
            raise DataError(
                f"{sources[0].named_by}: features are {store.dim} wide, in training they were "
                f"{self.vocabulary.feature_dim}: another detector made them"
            )
        return store

    def _extractor(self, regions: Regions) -> str | None:
        """Return what makes grid features under the configuration."""
        return GridExtractor(self.config).signature if regions == "grid" else None


def ranked_answers(counts: Mapping[str, int], most: int | None, least: int) -> list[str]:
    """Return the answers that occur at least ``least`` times, the ``most`` frequent ones first."""
    kept: Iterable[str] = (answer for answer, count in counts.items() if count >= least)
    return sorted(kept, key=lambda answer: (-counts[answer], answer))[:most]
