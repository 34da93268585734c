"""Losses of pre-training, chosen by the objective that each batch names."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from villa.batch import Batch
from villa.errors import ConfigError, DataError
from villa.losses.base import Direction, Loss, LossConfig, Reduction, divergence, yes_or_no
from villa.losses.classification import CrossEntropy, class_indices, widened
from villa.losses.lxmert import joint_consistency, joint_loss
from villa.models.base import ModelOutput
from villa.objectives import OBJECTIVES, check_objectives
from villa.registry import register_loss


def masked_features(output: ModelOutput, batch: Batch) -> Tensor:
    """Return the MRFR loss: squared error of masked region features, averaged over ``logits [M, D]``."""
    logits = widened(output.logits)
    return F.mse_loss(logits, _rows(batch, logits, "features"))


def masked_classes(output: ModelOutput, batch: Batch) -> Tensor:
    """Return the MRC loss: cross-entropy with the detector's classes, averaged over rows of ``logits [M, classes]``.

    The target of a distribution is its most likely class except column 0 (background), as in the release.
    """
    logits = widened(output.logits)
    if batch.targets is not None and batch.targets.is_floating_point():
        return F.cross_entropy(logits, _rows(batch, logits, "class distributions")[:, 1:].argmax(1) + 1)
    return F.cross_entropy(logits, class_indices(batch, logits))


def masked_distributions(output: ModelOutput, batch: Batch) -> Tensor:
    """Return the MRC-kl loss: KL(detector || model), averaged over ``logits [M, classes]`` as in the release."""
    logits = widened(output.logits)
    return F.kl_div(logits.log_softmax(1), _rows(batch, logits, "class distributions"), reduction="none").mean()


def mean_squared_difference(output: ModelOutput, clean: ModelOutput) -> Tensor:
    """Return the mean squared difference of two predictions of region features."""
    return F.mse_loss(output.logits, clean.logits)


def _rows(batch: Batch, logits: Tensor, what: str) -> Tensor:
    """Return the floating-point targets, of the shape of the logits.

    Raises:
        DataError: there are none, or they have another form.
    """
    targets = batch.targets
    if targets is None or not targets.is_floating_point() or targets.shape != logits.shape:
        given = "none" if targets is None else f"{targets.dtype} {list(targets.shape)}"
        raise DataError(
            f"objective '{batch.objective}' needs the {what} of the masked regions, {list(logits.shape)}, as targets "
            f"(given: {given})"
        )
    return targets.to(logits.dtype)


def alignment(output: ModelOutput, batch: Batch) -> Tensor:
    """Return the WRA loss: transport distances of matching pairs minus those of others, divided by all B pairs.

    Raises:
        DataError: the model computes no distance.
    """
    distance = output.extras.get("transport")
    if distance is None:
        raise DataError("objective 'itm_wra' needs a model that aligns words and regions; use 'itm' with this one")
    signs = 2 * class_indices(batch, distance) - 1
    return (signs * distance).sum() / len(distance)


@dataclass
class ContrastiveConfig(LossConfig):
    """Options of the contrastive loss.

    Attributes:
        form: ``softmax`` over the texts of each image and the images of each text (CLIP, arXiv 2103.00020), or
            ``sigmoid`` of each pair (SigLIP, arXiv 2303.15343).
    """

    name: str = "contrastive"
    form: Literal["softmax", "sigmoid"] = "softmax"


@register_loss("contrastive")
class Contrastive(Loss):
    """Contrastive loss over all pairs of a micro-batch; several texts may match one image."""

    Config: ClassVar[type[LossConfig]] = ContrastiveConfig
    config: ContrastiveConfig

    def forward(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean over examples.

        Args:
            output: has logits ``[B, B]``, images by texts.
            batch: has targets ``[B, B]``, 1 where the text matches the image; the target of a softmax with several
                matches is uniform over them.

        Raises:
            DataError: there are no targets, or they have another form.
        """
        logits, matches = widened(output.logits), self._matches(output.logits, batch)
        if self.config.form == "sigmoid":
            return -F.logsigmoid(logits * (2 * matches - 1)).sum(-1).mean()
        return (_soft_cross_entropy(logits, matches) + _soft_cross_entropy(logits.T, matches.T)) / 2

    def consistency(
        self,
        output: ModelOutput,
        clean: ModelOutput,
        batch: Batch,
        reduction: Reduction = "batchmean",
        direction: Direction = "symmetric",
    ) -> Tensor:
        """Return the divergence of the loss's distributions: over texts and over images, or of each pair."""
        ours, theirs = output.logits, clean.logits
        if self.config.form == "sigmoid":
            found = divergence(yes_or_no(ours), yes_or_no(theirs), reduction, direction)
            return found if reduction == "mean" else found * ours.shape[-1]
        rows, columns = ((ours, theirs), (ours.T, theirs.T))
        return (divergence(*rows, reduction, direction) + divergence(*columns, reduction, direction)) / 2

    def compares_examples(self, objectives: Collection[str]) -> bool:
        """Return True: the other examples are the negatives."""
        return True

    def _matches(self, logits: Tensor, batch: Batch) -> Tensor:
        targets = batch.targets
        if targets is None or targets.shape != logits.shape or not targets.is_floating_point():
            found = "none" if targets is None else f"{list(targets.shape)}"
            raise DataError(
                f"a contrastive loss needs targets [B, B], 1 where a text is about an image, not {found}; set "
                "dataset.target=pair, and a model that matches images and texts"
            )
        return targets.to(torch.promote_types(logits.dtype, torch.float32))


def _soft_cross_entropy(logits: Tensor, matches: Tensor) -> Tensor:
    share = matches / matches.sum(-1, keepdim=True).clamp(min=1)
    return -(share * logits.log_softmax(-1)).sum(-1).mean()


@dataclass
class PretrainingConfig(LossConfig):
    """Options of the pre-training loss.

    Attributes:
        weights: factors on the whole loss of objectives by name, VILLA's KL term included; 1 for others.
        transport_weight: weight of the word-region alignment in ``itm_wra``.
        region_weight: weight of LXMERT's losses on regions.
        contrastive_form: ``softmax`` or ``sigmoid``, the ``form`` of the loss ``contrastive``.
    """

    name: str = "pretraining"
    weights: dict[str, float] = field(default_factory=dict)
    transport_weight: float = 0.1
    region_weight: float = 1 / 0.15
    contrastive_form: Literal["softmax", "sigmoid"] = "softmax"

    def check(self) -> None:
        """Refuse unknown objectives and weights out of range."""
        check_objectives("loss.weights", self.weights)
        weights = {f"weights.{name}": weight for name, weight in self.weights.items()}
        weights |= {name: getattr(self, name) for name in ("transport_weight", "region_weight")}
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"loss.{name} is {weight}; it must be a finite number of at least 0")


@register_loss("pretraining")
class Pretraining(Loss):
    """The loss and the consistency term of the objective that each batch names."""

    Config: ClassVar[type[LossConfig]] = PretrainingConfig
    config: PretrainingConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._classes = CrossEntropy()
        self._contrastive = Contrastive(ContrastiveConfig(form=self.config.contrastive_form))
        self._terms: dict[str, Callable[[ModelOutput, Batch], Tensor]] = {
            "classes": self._classes,
            "features": masked_features,
            "top_class": masked_classes,
            "distribution": masked_distributions,
            "aligned": self._aligned,
            "lxmert": self._lxmert,
            "contrastive": self._contrastive,
        }

    def forward(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return the weighted mean loss of the batch's objective.

        Raises:
            DataError: the batch names no objective, or lacks its targets.
        """
        objective = named_objective(batch)
        if not self.count(batch):
            raise DataError(f"a batch of objective '{objective}' asks for nothing (first: '{batch.ids[0]}')")
        return self.config.weights.get(objective, 1.0) * self._terms[OBJECTIVES[objective].loss](output, batch)

    def consistency(
        self,
        output: ModelOutput,
        clean: ModelOutput,
        batch: Batch,
        reduction: Reduction = "batchmean",
        direction: Direction = "symmetric",
    ) -> Tensor:
        """Return the divergence for the batch's objective, weighted.

        It is the KL divergence, except for regressed features: their mean squared difference, whatever the reduction
        and direction.
        """
        objective = named_objective(batch)
        weight = self.config.weights.get(objective, 1.0)
        term = OBJECTIVES[objective].loss
        if term == "lxmert":
            return weight * joint_consistency(output, clean, batch, self.config.region_weight, reduction, direction)
        if term == "features":
            return weight * mean_squared_difference(output, clean)
        if term == "contrastive":
            return weight * self._contrastive.consistency(output, clean, batch, reduction, direction)
        return weight * divergence(output.logits, clean.logits, reduction, direction)

    def compares_examples(self, objectives: Collection[str]) -> bool:
        """Return whether ``contrastive`` is one of the objectives."""
        return "contrastive" in objectives and self._contrastive.compares_examples(objectives)

    def count(self, batch: Batch) -> int:
        """Return the number of masked tokens, masked regions or pairs."""
        return len(batch) if batch.targets is None else len(batch.targets)

    def _aligned(self, output: ModelOutput, batch: Batch) -> Tensor:
        value: Tensor = self._classes(output, batch) + self.config.transport_weight * alignment(output, batch)
        return value

    def _lxmert(self, output: ModelOutput, batch: Batch) -> Tensor:
        return joint_loss(output, batch, self.config.region_weight)


def named_objective(batch: Batch) -> str:
    """Return the objective of a batch.

    Raises:
        DataError: it names none, or an unknown one.
    """
    if batch.objective is None or batch.objective not in OBJECTIVES:
        given = "no objective" if batch.objective is None else f"objective '{batch.objective}'"
        raise DataError(f"a batch of pre-training names {given}; known: {', '.join(OBJECTIVES)}")
    return batch.objective
