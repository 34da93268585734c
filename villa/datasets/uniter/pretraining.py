"""Pre-training on the released databases with one objective, or with a mixture that draws one per update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from villa.batch import Batch
from villa.config.values import show
from villa.config.variants import Overlay
from villa.datasets.base import DatasetConfig, Example, Split
from villa.datasets.paths import SPLITS, DatabasePaths
from villa.datasets.synthetic.overlay import SMALL_PRETRAINING, SMALL_VCR_PRETRAINING
from villa.datasets.uniter.database_split import ConcatenatedSplit, Pair
from villa.datasets.uniter.databases import DatabaseConfig, DatabaseTask
from villa.datasets.uniter.image_lmdb import PairedImageStore
from villa.datasets.uniter.pretraining_splits import (
    PROBABILITY,
    Mixture,
    MixturePart,
    ObjectiveExample,
    ObjectiveSettings,
    ObjectiveSplit,
    VcrObjectiveSplit,
    collate_objective,
)
from villa.datasets.uniter.vcr import Vcr, VcrConfig
from villa.errors import ConfigError, DataError, nearest
from villa.json_values import is_number
from villa.objectives import OBJECTIVES
from villa.registry import register_dataset

_LISTS = tuple(f"{split}_{kind}" for split in SPLITS for kind in ("text", "images"))


@dataclass(frozen=True)
class Corpus:
    """A group of databases that are sampled together.

    Attributes:
        name: name in the recipe; empty for a single unnamed corpus.
        weight: relative frequency of updates from this corpus.
        databases: text and image database of every pair, by split.
    """

    name: str
    weight: float
    databases: Mapping[str, tuple[tuple[str, str], ...]]


def read_corpora(given: Mapping[str, Mapping[str, Any]]) -> list[Corpus]:
    """Parse ``dataset.corpora``.

    Args:
        given: ``{weight, train_text, train_images, val_text, val_images, ...}`` by name.

    Raises:
        ConfigError: a corpus is invalid; the message names it and its fault.
    """
    return [_corpus(name, fields) for name, fields in given.items()]


def check_weight(option: str, weight: Any) -> float:
    """Return a weight after checking it.

    Raises:
        ConfigError: the weight is not a finite number of at least 0.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise ConfigError(f"{option} is {show(weight)}; give a finite number of at least 0")
    return float(weight)


def _corpus(name: str, fields: Mapping[str, Any]) -> Corpus:
    option, known = f"dataset.corpora.{name}", ("weight", *_LISTS)
    wrong = next((key for key in fields if key not in known), None)
    if wrong is not None:
        raise ConfigError(
            f"{option} has the unknown key '{wrong}'{nearest(wrong, known)} (known: {', '.join(known)}; all other "
            "options are those of the data set)"
        )
    lists = {key: _paths(f"{option}.{key}", fields.get(key, [])) for key in _LISTS}
    for split in SPLITS:
        texts, images = len(lists[f"{split}_text"]), len(lists[f"{split}_images"])
        if texts != images:
            raise ConfigError(
                f"{option}.{split}_images names {images} image databases for {texts} text databases in {split}_text; "
                "give one for each"
            )
    if not any(lists.values()):
        raise ConfigError(f"{option} lists no databases; give train_text and train_images")
    pairs = {split: tuple(zip(lists[f"{split}_text"], lists[f"{split}_images"], strict=True)) for split in SPLITS}
    return Corpus(name, check_weight(f"{option}.weight", fields.get("weight", 1.0)), pairs)


def _paths(option: str, given: Any) -> list[str]:
    if not isinstance(given, list) or not all(isinstance(path, str) and path for path in given):
        raise ConfigError(f"{option} is {show(given)}; give a list of paths")
    return given


#: Objectives with examples of a text and an image.
WITH_IMAGES = tuple(name for name, objective in OBJECTIVES.items() if objective.example)
#: Objectives of VCR's second-stage pre-training.
OF_VCR = tuple(name for name in WITH_IMAGES if OBJECTIVES[name].example != "pair")
#: Message for dual encoders, which read whole images instead of region features.
_PAIRS = " here: it is for pairs of a text and a whole image, dataset=jsonl with dataset.target=pair"


class ObjectiveOptions(Protocol):
    """Interface shared by the configurations of pre-training."""

    name: str
    objective: str
    mix: dict[str, float]
    mask_probabilities: dict[str, float]

    def settings(self, objective: str) -> ObjectiveSettings:
        """Return the settings of an objective."""

    def sources(self) -> list[Corpus]:
        """Return the corpora; a single unnamed one if the recipe defines none."""

    @property
    def mixed(self) -> bool:
        """Whether updates come from several objectives or corpora."""


@dataclass
class PretrainingDataConfig(DatabaseConfig):
    """Options of pre-training, besides those that tasks on databases share.

    Attributes:
        objective: what is asked for: ``mlm`` (masked words), ``mrfr`` (features of masked regions), ``mrc`` and
            ``mrc_kl`` (their classes), ``itm`` and ``itm_wra`` (whether text and image match).
        mix: several objectives instead, each with how often an update is of it, relative to the others.
        corpora: databases by name, instead of the lists ``train_text`` and so on: a mapping with those lists, and
            ``weight``: how often an update is of this corpus, relative to the others.
        mask_probability: share of the words or regions that are masked.
        mask_probabilities: that of single objectives instead, by their names.
        negative_probability: share of the pairs that do not match.
    """

    OVERLAYS: ClassVar[tuple[Overlay, ...]] = SMALL_PRETRAINING

    name: str = "pretraining"
    objective: str = "mlm"
    mix: dict[str, float] = field(default_factory=dict)
    corpora: dict[str, dict[str, Any]] = field(default_factory=dict)
    mask_probability: float = PROBABILITY
    mask_probabilities: dict[str, float] = field(default_factory=dict)
    negative_probability: float = 0.5

    def check(self) -> None:
        """Check that the options are consistent."""
        super().check()
        check_options(self, WITH_IMAGES)
        listed = next((f"{split}_text" for split in SPLITS if getattr(self, f"{split}_text")), None)
        if self.corpora and listed is not None:
            raise ConfigError(f"dataset.{listed} lists databases, and dataset.corpora does too; give one of the two")
        if self.corpora and not sum(corpus.weight for corpus in self.sources()):
            raise ConfigError("dataset.corpora: all weights are 0; give one that is not")

    def objectives(self) -> dict[str, float]:
        """Return the objectives with their weights in the mixture; the same for all corpora."""
        return objective_weights(self)

    def settings(self, objective: str) -> ObjectiveSettings:
        """Return the settings of an objective."""
        share = self.mask_probabilities.get(objective, self.mask_probability)
        return ObjectiveSettings(objective, share, self.negative_probability)

    def sources(self) -> list[Corpus]:
        """Return the corpora; a single unnamed one if the recipe defines none."""
        return read_corpora(self.corpora) or [plain_corpus(self)]

    @property
    def mixed(self) -> bool:
        """Whether updates come from several objectives or corpora."""
        return bool(self.mix or self.corpora)


@dataclass
class VcrPretrainingConfig(VcrConfig):
    """Options of pre-training on VCR, besides those of the task.

    Attributes:
        objective: ``mlm`` (masked words), ``mrfr`` (features of masked regions), ``mrc`` or ``mrc_kl`` (their classes).
        mix: several objectives instead, each with how often an update is of it, relative to the others.
        mask_probability: share of the words or regions that are masked.
        mask_probabilities: that of single objectives instead, by their names.
    """

    OVERLAYS: ClassVar[tuple[Overlay, ...]] = SMALL_VCR_PRETRAINING

    name: str = "vcr_pretraining"
    objective: str = "mlm"
    mix: dict[str, float] = field(default_factory=dict)
    mask_probability: float = PROBABILITY
    mask_probabilities: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """Check that the options are consistent."""
        super().check()
        check_options(self, OF_VCR)

    def objectives(self) -> dict[str, float]:
        """Return the objectives with their weights in the mixture; the same for all corpora."""
        return objective_weights(self)

    def settings(self, objective: str) -> ObjectiveSettings:
        """Return the settings of an objective."""
        return ObjectiveSettings(objective, self.mask_probabilities.get(objective, self.mask_probability))

    def sources(self) -> list[Corpus]:
        """Return VCR as an unnamed corpus."""
        return [plain_corpus(self)]

    @property
    def mixed(self) -> bool:
        """Whether updates come from several objectives."""
        return bool(self.mix)


def plain_corpus(config: DatabaseConfig) -> Corpus:
    """Return the databases that a recipe lists without a corpus."""
    lists = ((split, getattr(config, f"{split}_text"), getattr(config, f"{split}_images")) for split in SPLITS)
    return Corpus("", 1.0, {split: tuple(zip(texts, images, strict=True)) for split, texts, images in lists})


def objective_weights(config: ObjectiveOptions) -> dict[str, float]:
    """Return the weights of the objectives, without those of weight 0."""
    return {name: weight for name, weight in config.mix.items() if weight} or {config.objective: 1.0}


def check_options(config: ObjectiveOptions, known: Sequence[str]) -> None:
    """Check the objectives and their options.

    Raises:
        ConfigError: an objective is unknown, or a share is out of range; the message names the option.
    """
    given = {f"dataset.objective='{config.objective}'": config.objective}
    for option in ("mix", "mask_probabilities"):
        given |= {f"dataset.{option} names '{name}', which": name for name in getattr(config, option)}
    for where, name in given.items():
        if name not in known:
            hint = _PAIRS if name == "contrastive" else nearest(name, list(known))
            raise ConfigError(f"{where} is not known{hint} (known: {', '.join(known)})")
    for name, weight in config.mix.items():
        check_weight(f"dataset.mix.{name}", weight)
    if config.mix and not sum(config.mix.values()):
        raise ConfigError("dataset.mix: all weights are 0; give one that is not")
    shares: dict[str, Any] = {name: getattr(config, name, 0.0) for name in ("mask_probability", "negative_probability")}
    shares |= {f"mask_probabilities.{name}": share for name, share in config.mask_probabilities.items()}
    for name, share in shares.items():
        if not (is_number(share) and 0 <= share <= 1):
            raise ConfigError(f"dataset.{name}={share} is not allowed; give a share in [0, 1]")


class ObjectiveTask(DatabaseTask):
    """Base of the pre-training data sets."""

    def listed(self, split: str) -> Sequence[str]:
        """Return the text databases of a split, of all corpora."""
        return [text for corpus in self._options.sources() for text, _ in corpus.databases[split]]

    def open_split(self, name: str) -> Split:
        """Open a split; a mixture has a part for every objective of every corpus."""
        if not self._options.mixed:
            return super().open_split(name)
        parts = [part for corpus in self._options.sources() for part in self._mixed(name, corpus)]
        if not parts:
            raise DataError(f"no corpus of dataset '{self.config.name}' has a split '{name}'; list its databases")
        return Mixture(parts)

    def settings(self) -> ObjectiveSettings:
        """Return the settings of the objective, or of a mixture's first one."""
        return self._options.settings(next(iter(objective_weights(self._options))))

    def num_labels(self) -> int | None:
        """Return the number of detector classes, if the databases store class distributions.

        Raises:
            DataError: the objective needs distributions, and there are none.
        """
        pair = self._first
        try:
            pair = replace(pair, text=pair.text.of_kind(next(iter(pair.text.kinds()), "")))
            rows: Any = pair.images_of(np.arange(1))[0]
            image = rows if isinstance(pair.images, PairedImageStore) else rows[0]
            return int(pair.images.soft_labels(image).shape[1])
        except (DataError, IndexError):
            if any(OBJECTIVES[name].head == "objects" for name in objective_weights(self._options)):
                raise
            return None

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad examples of one objective into a batch."""
        return collate_objective(cast("Sequence[ObjectiveExample]", examples))

    def submission(self, split: str) -> str | None:
        """Return None: there is nothing to submit."""
        return None

    def decode(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Return whether each pair matches, or the best token or class of each masked position, as a string of numbers.

        The score is the mean probability. For regressed features, the answer is their number, with score 0.
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

    def _mixed(self, name: str, corpus: Corpus) -> Iterator[MixturePart]:
        """Yield a part of a corpus's texts for every objective; the databases are opened once."""
        splits = [part for paths in self._of(corpus, name) for part in self.parts(name, self._open(paths))]
        for objective, weight in objective_weights(self._options).items() if splits and corpus.weight else ():
            settings = self._options.settings(objective)
            asking: list[Split] = [cast("ObjectiveSplit", split).asking(settings) for split in splits]
            label = f"{objective}/{corpus.name}" if corpus.name else objective
            yield MixturePart(label, objective, weight * corpus.weight, ConcatenatedSplit(asking))

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
    """Captions and their images, for one objective or a mixture."""

    Config: ClassVar[type[DatasetConfig]] = PretrainingDataConfig
    config: PretrainingDataConfig

    def parts(self, name: str, pair: Pair) -> list[Split]:
        """Return one split for a pair of databases."""
        return [ObjectiveSplit(self, name, pair, self.chosen(name, pair.text), self.settings())]


@register_dataset("vcr_pretraining")
class VcrPretraining(ObjectiveTask, Vcr):
    """VCR's texts for one objective or a mixture: questions with the right answer, with and without its rationale."""

    Config: ClassVar[type[DatasetConfig]] = VcrPretrainingConfig
    config: VcrPretrainingConfig

    def parts(self, name: str, pair: Pair) -> list[Split]:
        """Return a split for each kind of text."""
        pairs = [(kind, replace(pair, text=pair.text.of_kind(kind))) for kind in ("qa", "qar")]
        return [
            VcrObjectiveSplit(self, name, pair, self.chosen(name, pair.text), self.settings(), kind)
            for kind, pair in pairs
        ]
