"""Pre-training on the released databases, one objective at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from villa.batch import Batch
from villa.config.overlays import Overlay
from villa.datasets.base import DatasetConfig, Example, Split
from villa.datasets.database_split import Pair
from villa.datasets.databases import DatabaseConfig, DatabaseTask
from villa.datasets.pretraining.examples import ObjectiveExample, collate_objective
from villa.datasets.pretraining.masking import PROBABILITY
from villa.datasets.pretraining.splits import ObjectiveSettings, ObjectiveSplit, VcrObjectiveSplit
from villa.datasets.synthetic.overlay import SMALL_PRETRAINING, SMALL_VCR_PRETRAINING
from villa.datasets.vcr import Vcr, VcrConfig
from villa.errors import ConfigError, DataError, nearest
from villa.registry import register_dataset

#: Objectives that texts with images have examples for.
OBJECTIVES = ("mlm", "mrfr", "mrc", "mrc_kl", "itm", "itm_wra")
#: Those of VCR's second stage.
VCR_OBJECTIVES = ("mlm", "mrfr", "mrc", "mrc_kl")
_CLASS_OBJECTIVES = ("mrc", "mrc_kl")


@dataclass
class PretrainingDataConfig(DatabaseConfig):
    """Options of pre-training, besides those that tasks on databases share.

    Attributes:
        objective: what is asked for: ``mlm`` (masked words), ``mrfr`` (features of masked regions), ``mrc`` and
            ``mrc_kl`` (their classes), ``itm`` and ``itm_wra`` (whether text and image match).
        mask_probability: share of the words or regions that are masked.
        negative_probability: share of the pairs that do not match.
    """

    OVERLAYS: ClassVar[tuple[Overlay, ...]] = SMALL_PRETRAINING

    name: str = "pretraining"
    objective: str = "mlm"
    mask_probability: float = PROBABILITY
    negative_probability: float = 0.5

    def check(self) -> None:
        """Refuse options that do not go together."""
        super().check()
        check_settings(self.settings(), OBJECTIVES)

    def settings(self) -> ObjectiveSettings:
        """The objective's settings."""
        return ObjectiveSettings(self.objective, self.mask_probability, self.negative_probability)


@dataclass
class VcrPretrainingConfig(VcrConfig):
    """Options of pre-training on VCR, besides those of the task.

    Attributes:
        objective: ``mlm`` (masked words), ``mrfr`` (features of masked regions), ``mrc`` or ``mrc_kl`` (their classes).
        mask_probability: share of the words or regions that are masked.
    """

    OVERLAYS: ClassVar[tuple[Overlay, ...]] = SMALL_VCR_PRETRAINING

    name: str = "vcr_pretraining"
    objective: str = "mlm"
    mask_probability: float = PROBABILITY

    def check(self) -> None:
        """Refuse options that do not go together."""
        super().check()
        check_settings(self.settings(), VCR_OBJECTIVES)

    def settings(self) -> ObjectiveSettings:
        """The objective's settings."""
        return ObjectiveSettings(self.objective, self.mask_probability)


class ObjectiveTask(DatabaseTask):
    """What the data sets of pre-training share."""

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
            if self.config.settings().objective in _CLASS_OBJECTIVES:  # type: ignore[attr-defined]
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


@register_dataset("pretraining")
class Pretraining(ObjectiveTask):
    """Texts about images (captions), for one objective."""

    Config: ClassVar[type[DatasetConfig]] = PretrainingDataConfig
    config: PretrainingDataConfig

    def parts(self, name: str, pair: Pair) -> list[Split]:
        """One split a pair of databases."""
        return [ObjectiveSplit(self, name, pair, self.text_lengths(name, pair), self.config.settings())]


@register_dataset("vcr_pretraining")
class VcrPretraining(ObjectiveTask, Vcr):
    """VCR's texts for one objective: questions with the right answer, and with the right rationale behind it."""

    Config: ClassVar[type[DatasetConfig]] = VcrPretrainingConfig
    config: VcrPretrainingConfig

    def parts(self, name: str, pair: Pair) -> list[Split]:
        """Both kinds of text, of every pair of databases."""
        settings = self.config.settings()
        return [
            VcrObjectiveSplit(self, name, pair, self.text_lengths(name, pair, kind), settings, kind)
            for kind in ("qa", "qar")
        ]


def check_settings(settings: ObjectiveSettings, known: Sequence[str]) -> None:
    """Refuse an objective that is not known, and shares that are none.

    Raises:
        ConfigError: naming the option.
    """
    if settings.objective not in known:
        raise ConfigError(
            f"dataset.objective='{settings.objective}' is not known{nearest(settings.objective, list(known))} "
            f"(known: {', '.join(known)})"
        )
    for name in ("mask_probability", "negative_probability"):
        if not 0 <= getattr(settings, name) <= 1:
            raise ConfigError(f"dataset.{name}={getattr(settings, name)} is not allowed; give a share in [0, 1]")
