"""The loss of pre-training: every batch says which objective it is for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from villa.batch import Batch
from villa.errors import ConfigError, DataError
from villa.losses.base import Loss, LossConfig, Reduction, symmetric_kl
from villa.losses.classification import CrossEntropy, class_indices, widened
from villa.losses.lxmert import joint_consistency, joint_loss
from villa.models.base import ModelOutput
from villa.objectives import OBJECTIVES, check_objectives
from villa.registry import register_loss


def masked_features(output: ModelOutput, batch: Batch) -> Tensor:
    """MRFR: squared error of the masked regions' features, mean over rows and columns of ``logits [M, D]``."""
    logits = widened(output.logits)
    return F.mse_loss(logits, _rows(batch, logits, "features"))


def masked_classes(output: ModelOutput, batch: Batch) -> Tensor:
    """MRC: cross-entropy to the detector's class of each masked region, mean over rows of ``logits [M, classes]``.

    Of a distribution the likeliest class counts, column 0 (background) left out as in the release; class indices are
    taken as they are.
    """
    logits = widened(output.logits)
    if batch.targets is not None and batch.targets.is_floating_point():
        return F.cross_entropy(logits, _rows(batch, logits, "class distributions")[:, 1:].argmax(1) + 1)
    return F.cross_entropy(logits, class_indices(batch, logits))


def masked_distributions(output: ModelOutput, batch: Batch) -> Tensor:
    """MRC-kl: KL(detector || model), mean over rows and columns of ``logits [M, classes]`` as in the release."""
    logits = widened(output.logits)
    return F.kl_div(logits.log_softmax(1), _rows(batch, logits, "class distributions"), reduction="none").mean()


def mean_squared_difference(output: ModelOutput, clean: ModelOutput) -> Tensor:
    """How far two predictions of features are apart: the squared difference, mean over rows and columns."""
    return F.mse_loss(output.logits, clean.logits)


def _rows(batch: Batch, logits: Tensor, what: str) -> Tensor:
    """Floating targets, a row for each row of the logits.

    Raises:
        DataError: there are none, or of another form.
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
    """WRA: transport distances of right pairs less those of wrong ones, divided by all B pairs.

    Raises:
        DataError: the model gives no distance.
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
        form: ``softmax`` over the texts for every image and over the images for every text (CLIP, arXiv 2103.00020),
            or ``sigmoid`` of every pair on its own (SigLIP, arXiv 2303.15343).
    """

    name: str = "contrastive"
    form: Literal["softmax", "sigmoid"] = "softmax"


@register_loss("contrastive")
class Contrastive(Loss):
    """Contrastive loss over all pairs of a micro-batch; several texts may be about one image."""

    Config: ClassVar[type[LossConfig]] = ContrastiveConfig
    config: ContrastiveConfig

    def forward(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean over examples.

        Args:
            output: with logits ``[B, B]``, images by texts.
            batch: with targets ``[B, B]``, 1 where the text is about the image. Where several are, the softmax is
                compared with the uniform distribution over them.

        Raises:
            DataError: there are no targets, or they do not say which pairs match.
        """
        logits, matches = widened(output.logits), self._matches(output.logits, batch)
        if self.config.form == "sigmoid":
            return -F.logsigmoid(logits * (2 * matches - 1)).sum(-1).mean()
        return (_soft_cross_entropy(logits, matches) + _soft_cross_entropy(logits.T, matches.T)) / 2

    def consistency(
        self, output: ModelOutput, clean: ModelOutput, batch: Batch, reduction: Reduction = "batchmean"
    ) -> Tensor:
        """Return the divergence of the distributions that the loss compares: over texts and images, or of each pair."""
        ours, theirs = output.logits, clean.logits
        if self.config.form == "sigmoid":
            divergence = symmetric_kl(_match_or_not(ours), _match_or_not(theirs), reduction)
            return divergence if reduction == "mean" else divergence * ours.shape[-1]
        return (symmetric_kl(ours, theirs, reduction) + symmetric_kl(ours.T, theirs.T, reduction)) / 2

    def compares_examples(self, objectives: Collection[str]) -> bool:
        """True: the texts and images of the others are those that do not match."""
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


def _match_or_not(logits: Tensor) -> Tensor:
    """Logits ``[pairs, 2]`` whose softmax is the sigmoid of each, and its rest."""
    return torch.stack((logits, torch.zeros_like(logits)), dim=-1).flatten(0, 1)


def _soft_cross_entropy(logits: Tensor, matches: Tensor) -> Tensor:
    share = matches / matches.sum(-1, keepdim=True).clamp(min=1)
    return -(share * logits.log_softmax(-1)).sum(-1).mean()


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
            "classes": self._classes,
            "features": masked_features,
            "top_class": masked_classes,
            "distribution": masked_distributions,
            "aligned": self._aligned,
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
        return self.config.weights.get(objective, 1.0) * self._terms[OBJECTIVES[objective].loss](output, batch)

    def consistency(
        self, output: ModelOutput, clean: ModelOutput, batch: Batch, reduction: Reduction = "batchmean"
    ) -> Tensor:
        """Return the divergence of the masked words' distributions, of the match or of the class distributions.

        That of regressed features is the mean squared difference, whatever the reduction.
        """
        objective = named_objective(batch)
        weight = self.config.weights.get(objective, 1.0)
        term = OBJECTIVES[objective].loss
        if term == "lxmert":
            return weight * joint_consistency(output, clean, batch, reduction, self.config.region_weight)
        if term == "features":
            return weight * mean_squared_difference(output, clean)
        if term == "contrastive":
            return weight * self._contrastive.consistency(output, clean, batch, reduction)
        return weight * symmetric_kl(output.logits, clean.logits, reduction)

    def compares_examples(self, objectives: Collection[str]) -> bool:
        """Whether one of the objectives does."""
        return "contrastive" in objectives and self._contrastive.compares_examples(objectives)

    def count(self, batch: Batch) -> int:
        """Masked tokens or regions, or else pairs: the elements that the mean runs over."""
        return len(batch) if batch.targets is None else len(batch.targets)

    def _aligned(self, output: ModelOutput, batch: Batch) -> Tensor:
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
