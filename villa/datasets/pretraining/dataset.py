"""Pre-training on the released databases: one objective, or a mixture of which every update has one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from villa.batch import Batch
from villa.datasets.base import DatasetConfig, Example, Split
from villa.datasets.database_paths import DatabasePaths
from villa.datasets.database_split import ConcatenatedSplit, Pair
from villa.datasets.databases import DatabaseTask
from villa.datasets.mixture import Mixture, Part
from villa.datasets.pretraining.corpora import Corpus
from villa.datasets.pretraining.examples import ObjectiveExample, collate_objective
from villa.datasets.pretraining.options import (
    ObjectiveOptions,
    PretrainingDataConfig,
    VcrPretrainingConfig,
    objective_weights,
)
from villa.datasets.pretraining.splits import ObjectiveSettings, ObjectiveSplit, VcrObjectiveSplit
from villa.datasets.vcr import Vcr
from villa.errors import DataError
from villa.registry import register_dataset

_CLASS_OBJECTIVES = {"mrc", "mrc_kl"}


class ObjectiveTask(DatabaseTask):
    """What the data sets of pre-training share."""

    def listed(self, split: str) -> Sequence[str]:
        """The text databases of a split, of all corpora."""
        return [text for corpus in self._options.sources() for text, _ in corpus.databases[split]]

    def open_split(self, name: str) -> Split:
        """Open a split; of a mixture, every objective of every corpus is a part."""
        if not self._options.mixed:
            return super().open_split(name)
        parts = [part for corpus in self._options.sources() for part in self._mixed(name, corpus)]
        if not parts:
            raise DataError(f"no corpus of dataset '{self.config.name}' has a split '{name}'; list its databases")
        return Mixture(parts)

    def settings(self) -> ObjectiveSettings:
        """The settings of the objective, or of the first one of a mixture."""
        return self._options.settings(next(iter(objective_weights(self._options))))

    def num_labels(self) -> int | None:
        """Classes of the detector, where the databases store its distributions.

        Raises:
            DataError: the objective needs them, and they do not.
        """
        text, images = self._first.text, self._first.images
        try:
            names: Any = next(iter(text.images.values()))
            return int(images.soft_labels(names).shape[1])
        except (DataError, StopIteration):
            if _CLASS_OBJECTIVES & objective_weights(self._options).keys():
                raise
            return None

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad examples of one objective into a batch."""
        return collate_objective(cast("Sequence[ObjectiveExample]", examples))

    def submission(self, split: str) -> str | None:
        """None."""
        return None

    def decode(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Return whether each pair matches; or the best words or classes of the masked places, as text of numbers.

        Their score is the mean probability. Regressed features have no answer: their number is given, with score 0.
        """
        masked = batch.masked_tokens if batch.masked_regions is None else batch.masked_regions
        if masked is None:
            return super().decode(logits, batch)
        counts: list[int] = masked.sum(1).tolist()
        if batch.objective == "mrfr":
            return [{"answer": count, "score": 0.0} for count in counts]
        scores, best = logits.float().softmax(-1).max(-1)
        rows = zip(torch.split(best, counts), torch.split(scores, counts), strict=True)
        return [
            {"answer": " ".join(map(str, answers.tolist())), "score": score.mean().item()} for answers, score in rows
        ]

    @property
    def _options(self) -> ObjectiveOptions:
        return cast("ObjectiveOptions", self.config)

    def _mixed(self, name: str, corpus: Corpus) -> Iterator[Part]:
        """Yield a corpus's texts for every objective; they are opened and measured once."""
        splits = [part for paths in self._of(corpus, name) for part in self.parts(name, self._open(paths))]
        for objective, weight in objective_weights(self._options).items() if splits and corpus.weight else ():
            settings = self._options.settings(objective)
            asking: list[Split] = [cast("ObjectiveSplit", split).asking(settings) for split in splits]
            label = f"{objective}/{corpus.name}" if corpus.name else objective
            yield Part(label, objective, weight * corpus.weight, ConcatenatedSplit(asking))

    def _of(self, corpus: Corpus, name: str) -> Iterator[DatabasePaths]:
        if self.config.synthetic:
            yield DatabasePaths.synthetic(self.root, self.config.name, name)
            return
        for text, images in corpus.databases[name]:
            yield DatabasePaths.of(self.root, name, text, images)

    def _paths(self, name: str) -> Iterator[DatabasePaths]:
        yield from dict.fromkeys(paths for corpus in self._options.sources() for paths in self._of(corpus, name))


@register_dataset("pretraining")
class Pretraining(ObjectiveTask):
    """Texts about images (captions), for one objective."""

    Config: ClassVar[type[DatasetConfig]] = PretrainingDataConfig
    config: PretrainingDataConfig

    def parts(self, name: str, pair: Pair) -> list[Split]:
        """One split a pair of databases."""
        return [ObjectiveSplit(self, name, pair, self.text_lengths(name, pair), self.settings())]


@register_dataset("vcr_pretraining")
class VcrPretraining(ObjectiveTask, Vcr):
    """VCR's texts for one objective: questions with the right answer, and with the right rationale behind it."""

    Config: ClassVar[type[DatasetConfig]] = VcrPretrainingConfig
    config: VcrPretrainingConfig

    def parts(self, name: str, pair: Pair) -> list[Split]:
        """Both kinds of text, of every pair of databases."""
        settings = self.settings()
        return [
            VcrObjectiveSplit(self, name, pair, self.text_lengths(name, pair, kind), settings, kind)
            for kind in ("qa", "qar")
        ]
