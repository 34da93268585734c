"""The loss of pre-training: every batch says which objective it is for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from villa.batch import Batch
from villa.errors import ConfigError, DataError
from villa.losses.base import Loss, LossConfig
from villa.losses.classification import CrossEntropy
from villa.losses.consistency import Reduction, symmetric_kl
from villa.losses.contrastive import Contrastive, ContrastiveConfig
from villa.losses.lxmert import joint_consistency, joint_loss
from villa.losses.masked import masked_classes, masked_distributions, masked_features, mean_squared_difference
from villa.losses.matching import alignment
from villa.models.base import ModelOutput
from villa.objectives import OBJECTIVES, check_objectives
from villa.registry import register_loss


@dataclass
class PretrainingConfig(LossConfig):
    """Options of the pre-training loss.

    Attributes:
        weights: factor on the whole loss of single objectives by name, the KL term of VILLA included; 1 for others.
        transport_weight: weight of the alignment of words and regions in ``itm_wra``.
        region_weight: weight of LXMERT's losses about regions.
        contrastive_form: ``softmax`` or ``sigmoid``, the ``form`` of the loss ``contrastive``.
    """

    name: str = "pretraining"
    weights: dict[str, float] = field(default_factory=dict)
    transport_weight: float = 0.1
    region_weight: float = 1 / 0.15
    contrastive_form: Literal["softmax", "sigmoid"] = "softmax"

    def check(self) -> None:
        """Refuse unknown objectives and weights that make no sense."""
        check_objectives("loss.weights", self.weights)
        weights = {f"weights.{name}": weight for name, weight in self.weights.items()}
        weights |= {name: getattr(self, name) for name in ("transport_weight", "region_weight")}
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"loss.{name} is {weight}; it must be a finite number of at least 0")


@register_loss("pretraining")
class Pretraining(Loss):
    """The objective that each batch names, and what takes the place of the KL term where it has no distribution."""

    Config: ClassVar[type[LossConfig]] = PretrainingConfig
    config: PretrainingConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._classes = CrossEntropy()
        self._contrastive = Contrastive(ContrastiveConfig(form=self.config.contrastive_form))
        self._terms: dict[str, Callable[[ModelOutput, Batch], Tensor]] = {
            **dict.fromkeys(("mlm", "itm", "qa"), self._classes),
            "mrfr": masked_features,
            "mrc": masked_classes,
            "mrc_kl": masked_distributions,
            "itm_wra": self._itm_wra,
            "lxmert": self._lxmert,
            "contrastive": self._contrastive,
        }

    def forward(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean loss of the batch's objective, weighted.

        Raises:
            DataError: the batch names no objective, or lacks its targets.
        """
        objective = named_objective(batch)
        if not self.count(batch):
            raise DataError(f"a batch of objective '{objective}' asks for nothing (first: '{batch.ids[0]}')")
        return self.config.weights.get(objective, 1.0) * self._terms[objective](output, batch)

    def consistency(
        self, output: ModelOutput, clean: ModelOutput, batch: Batch, reduction: Reduction = "batchmean"
    ) -> Tensor:
        """Return the divergence of the masked words' distributions, of the match or of the class distributions.

        That of regressed features is the mean squared difference, whatever the reduction.
        """
        objective = named_objective(batch)
        weight = self.config.weights.get(objective, 1.0)
        if objective == "lxmert":
            return weight * joint_consistency(output, clean, batch, reduction, self.config.region_weight)
        if objective == "mrfr":
            return weight * mean_squared_difference(output, clean)
        if objective == "contrastive":
            return weight * self._contrastive.consistency(output, clean, batch, reduction)
        return weight * symmetric_kl(output.logits, clean.logits, reduction)

    def compares_examples(self, objectives: Collection[str]) -> bool:
        """Whether one of the objectives does."""
        return "contrastive" in objectives and self._contrastive.compares_examples(objectives)

    def count(self, batch: Batch) -> int:
        """Masked tokens or regions, or else pairs: the elements that the mean runs over."""
        return len(batch) if batch.targets is None else len(batch.targets)

    def _itm_wra(self, output: ModelOutput, batch: Batch) -> Tensor:
        value: Tensor = self._classes(output, batch) + self.config.transport_weight * alignment(output, batch)
        return value

    def _lxmert(self, output: ModelOutput, batch: Batch) -> Tensor:
        return joint_loss(output, batch, self.config.region_weight)


def named_objective(batch: Batch) -> str:
    """The objective that a batch is for.

    Raises:
        DataError: it names none, or one that is not known.
    """
    if batch.objective is None or batch.objective not in OBJECTIVES:
        given = "no objective" if batch.objective is None else f"objective '{batch.objective}'"
        raise DataError(f"a batch of pre-training names {given}; known: {', '.join(OBJECTIVES)}")
    return batch.objective
