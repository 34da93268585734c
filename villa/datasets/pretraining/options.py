"""Options of pre-training: which objectives, of which databases, and how often each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from villa.config.overlays import Overlay
from villa.datasets.database_paths import SPLITS
from villa.datasets.databases import DatabaseConfig
from villa.datasets.pretraining.corpora import Corpus, check_weight, read_corpora
from villa.datasets.pretraining.masking import PROBABILITY
from villa.datasets.pretraining.splits import ObjectiveSettings
from villa.datasets.synthetic.overlay import SMALL_PRETRAINING, SMALL_VCR_PRETRAINING
from villa.datasets.vcr import VcrConfig
from villa.errors import ConfigError, nearest
from villa.json_values import is_number

#: Objectives that texts with images have examples for.
OBJECTIVES = ("mlm", "mrfr", "mrc", "mrc_kl", "itm", "itm_wra")
#: Those of VCR's second stage.
VCR_OBJECTIVES = ("mlm", "mrfr", "mrc", "mrc_kl")
#: Databases have features of regions; models that embed texts and images apart read whole images.
_PAIRS = " here: it is for pairs of a text and a whole image, dataset=jsonl with dataset.target=pair"


class ObjectiveOptions(Protocol):
    """What the configurations of pre-training have in common."""

    name: str
    objective: str
    mix: dict[str, float]
    mask_probabilities: dict[str, float]

    def settings(self, objective: str) -> ObjectiveSettings:
        """The settings of an objective."""

    def sources(self) -> list[Corpus]:
        """The databases; one corpus without a name where the recipe does not tell several apart."""

    @property
    def mixed(self) -> bool:
        """Whether updates are of several objectives or corpora."""


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
        """Refuse options that do not go together."""
        super().check()
        check_objectives(self, OBJECTIVES)
        listed = next((f"{split}_text" for split in SPLITS if getattr(self, f"{split}_text")), None)
        if self.corpora and listed is not None:
            raise ConfigError(f"dataset.{listed} lists databases, and dataset.corpora does too; give one of the two")
        if self.corpora and not sum(corpus.weight for corpus in self.sources()):
            raise ConfigError("dataset.corpora: all weights are 0; give one that is not")

    def objectives(self) -> dict[str, float]:
        """The objective, or those of the mixture with their shares; corpora have the same ones."""
        return objective_weights(self)

    def settings(self, objective: str) -> ObjectiveSettings:
        """The settings of an objective."""
        share = self.mask_probabilities.get(objective, self.mask_probability)
        return ObjectiveSettings(objective, share, self.negative_probability)

    def sources(self) -> list[Corpus]:
        """The databases; one corpus without a name where the recipe does not tell several apart."""
        return read_corpora(self.corpora) or [plain_corpus(self)]

    @property
    def mixed(self) -> bool:
        """Whether updates are of several objectives or corpora."""
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
        """Refuse options that do not go together."""
        super().check()
        check_objectives(self, VCR_OBJECTIVES)

    def objectives(self) -> dict[str, float]:
        """The objective, or those of the mixture with their shares; corpora have the same ones."""
        return objective_weights(self)

    def settings(self, objective: str) -> ObjectiveSettings:
        """The settings of an objective."""
        return ObjectiveSettings(objective, self.mask_probabilities.get(objective, self.mask_probability))

    def sources(self) -> list[Corpus]:
        """VCR, which has no name."""
        return [plain_corpus(self)]

    @property
    def mixed(self) -> bool:
        """Whether updates are of several objectives."""
        return bool(self.mix)


def plain_corpus(config: DatabaseConfig) -> Corpus:
    """Return the databases that a recipe lists without names."""
    lists = ((split, getattr(config, f"{split}_text"), getattr(config, f"{split}_images")) for split in SPLITS)
    return Corpus("", 1.0, {split: tuple(zip(texts, images, strict=True)) for split, texts, images in lists})


def objective_weights(config: ObjectiveOptions) -> dict[str, float]:
    """Return the objectives with how often an update is of each: those of weight 0 are left out."""
    return {name: weight for name, weight in config.mix.items() if weight} or {config.objective: 1.0}


def check_objectives(config: ObjectiveOptions, known: Sequence[str]) -> None:
    """Refuse objectives that are not known, and shares that are none.

    Raises:
        ConfigError: naming the option.
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
