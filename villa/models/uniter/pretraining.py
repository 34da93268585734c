"""UNITER's pre-training heads; every batch names the objective that selects one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from villa.batch import Batch
from villa.errors import DataError
from villa.models.base import ModelOutput, Point
from villa.models.rows import Reads, given_mask
from villa.models.uniter.config import LAYER_NORM_EPS, UniterSizes, register_head
from villa.models.uniter.model import Encoded, Uniter
from villa.objectives import OBJECTIVES

T = TypeVar("T")


class Transform(nn.Module):
    """Linear layer, GELU and LayerNorm before a decoder (BERT)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, states: Tensor) -> Tensor:
        """Transform ``[N, hidden]``."""
        normalised: Tensor = self.LayerNorm(F.gelu(self.dense(states)))
        return normalised


class WordPrediction(nn.Module):
    """Logits of masked tokens; the decoder is tied to the word embedding."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        words, hidden_size = embedding.weight.shape
        self.transform = Transform(hidden_size)
        self.decoder = nn.Linear(hidden_size, words, bias=False)
        self.decoder.weight = embedding.weight
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, states: Tensor) -> Tensor:
        """Map ``[N, hidden]`` to ``[N, vocabulary]``."""
        return F.linear(self.transform(states), self.decoder.weight, self.bias)


class FeatureRegression(nn.Module):
    """Regression of region features; the decoder is the transposed feature projection, with a tied weight."""

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.net = region_transform(projection.out_features)
        self.weight = projection.weight
        self.bias = nn.Parameter(torch.zeros(projection.in_features))

    def forward(self, states: Tensor) -> Tensor:
        """Map ``[M, hidden]`` to ``[M, feature_dim]``."""
        return F.linear(self.net(states), self.weight.t(), self.bias)


class RegionClassifier(nn.Module):
    """Logits of the detector's classes."""

    def __init__(self, hidden_size: int, classes: int) -> None:
        super().__init__()
        self.net = region_transform(hidden_size).append(nn.Linear(hidden_size, classes))

    def forward(self, states: Tensor) -> Tensor:
        """Map ``[M, hidden]`` to ``[M, classes]``."""
        scores: Tensor = self.net(states)
        return scores


def region_transform(hidden_size: int) -> nn.Sequential:
    """Return a linear layer, GELU and LayerNorm."""
    return nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS))


def head_of(batch: Batch, heads: Mapping[str, T]) -> T:
    """Return the head for the objective of a batch.

    Args:
        batch: names the objective.
        heads: heads by what they predict (``Objective.head``).

    Raises:
        DataError: the model has no such head.
    """
    known = {name: heads[objective.head] for name, objective in OBJECTIVES.items() if objective.head in heads}
    objective = batch.objective or ""
    if objective not in known:
        given = f"objective '{objective}'" if objective else "no objective"
        raise DataError(
            f"the batch is for {given}, but the model has heads for {', '.join(known)}; use a data set of one of "
            "these, or the head of the task"
        )
    return known[objective]


def required_mask(name: str, batch: Batch) -> Tensor:
    """Return ``masked_tokens`` or ``masked_regions`` of a batch.

    Raises:
        DataError: the batch lacks it.
    """
    mask: Tensor | None = getattr(batch, name)
    if mask is None:
        raise DataError(f"the batch is for objective '{batch.objective}' but has no {name} (first: '{batch.ids[0]}')")
    return mask


#: Lower bound on the norms in the cosine (released code).
_SMALLEST_NORM = 1e-5


class Transport(NamedTuple):
    """Optimal-transport alignment of tokens and regions (word-region alignment).

    Attributes:
        distance: ``[B]`` cost of the plan; gradients flow through the costs, not through the plan.
        cost: ``[B, T, R]``, 1 - cosine of token and region; 0 where either is padding.
        plan: ``[B, R, T]`` mass moved from region to token; 0 where either is padding.
    """

    distance: Tensor
    cost: Tensor
    plan: Tensor


def align(
    words: Tensor,
    regions: Tensor,
    word_mask: Tensor,
    region_mask: Tensor,
    *,
    beta: float = 0.5,
    iterations: int = 50,
    inner: int = 1,
) -> Transport:
    """Align tokens with regions, in fp32 or wider regardless of autocast.

    Args:
        words: ``[B, T, hidden]`` states.
        regions: ``[B, R, hidden]`` states.
        word_mask: ``[B, T]`` bool, True on real tokens; at least one a row.
        region_mask: ``[B, R]`` bool, True on real regions; at least one a row.
        beta: weight of the proximal term; smaller values approach the exact plan in fewer iterations.
        iterations: proximal steps.
        inner: Sinkhorn iterations per step.
    """
    with torch.autocast(words.device.type, enabled=False):
        wide = torch.promote_types(words.dtype, torch.float32)
        cost = _cosine_cost(words.to(wide), regions.to(wide))
        cost = cost.masked_fill(~(word_mask.unsqueeze(2) & region_mask.unsqueeze(1)), 0)
        plan = transport_plan(cost.detach(), word_mask, region_mask, beta=beta, iterations=iterations, inner=inner)
        return Transport((cost * plan.transpose(1, 2)).sum((1, 2)), cost, plan)


@torch.no_grad()
def transport_plan(
    cost: Tensor, word_mask: Tensor, region_mask: Tensor, *, beta: float = 0.5, iterations: int = 50, inner: int = 1
) -> Tensor:
    """Find the cheapest transport plan between uniform distributions over tokens and over regions (IPOT).

    Each proximal step regularises by the divergence from the last plan, and solves the problem by scaling the rows
    and columns of (kernel x plan) to the marginals.

    Args:
        cost: ``[B, T, R]``.
        word_mask: ``[B, T]`` bool.
        region_mask: ``[B, R]`` bool.
        beta: weight of the proximal term.
        iterations: proximal steps.
        inner: scalings per step.

    Returns:
        ``[B, R, T]``; sums over tokens are close to 1 / regions, sums over regions are 1 / tokens.
    """
    word_weight, region_weight = (_uniform(mask, cost) for mask in (word_mask, region_mask))
    real = region_mask.unsqueeze(2) & word_mask.unsqueeze(1)
    kernel = (-cost.transpose(1, 2) / beta).exp() * real
    plan, word_scale = real.to(cost), word_weight
    for _ in range(iterations):
        scaled = kernel * plan
        for _ in range(inner):
            region_scale = _divided(region_weight, (scaled @ word_scale.unsqueeze(2)).squeeze(2))
            word_scale = _divided(word_weight, (region_scale.unsqueeze(1) @ scaled).squeeze(1))
        plan = region_scale.unsqueeze(2) * scaled * word_scale.unsqueeze(1)
    return plan


def _cosine_cost(words: Tensor, regions: Tensor) -> Tensor:
    """Return 1 - cosine of every token ``[B, T, hidden]`` and region ``[B, R, hidden]``: ``[B, T, R]``."""
    unit_words, unit_regions = (F.normalize(states, dim=-1, eps=_SMALLEST_NORM) for states in (words, regions))
    return 1 - unit_words @ unit_regions.transpose(1, 2)


def _uniform(mask: Tensor, like: Tensor) -> Tensor:
    """Return the uniform distribution over real positions, 0 at padding."""
    return mask.to(like) / mask.sum(1, keepdim=True)


def _divided(weight: Tensor, mass: Tensor) -> Tensor:
    """Return ``weight / mass``, or 0 at padding, where both are 0."""
    return torch.where(weight > 0, weight / mass, torch.zeros_like(mass))


@register_head("pretraining")
class UniterForPretraining(Uniter):
    """UNITER that predicts the targets of the batch's objective.

    Logits are ``[N, vocabulary]`` of the N masked tokens (``mlm``), ``[M, feature_dim]`` (``mrfr``) or ``[M, labels]``
    (``mrc``, ``mrc_kl``) of the M masked regions, or ``[B, 2]`` (``itm``, ``itm_wra``); ``itm_wra`` adds
    ``extras["transport"]``, the transport distance ``[B]``. The labels are the detector's classes (1,601 in the
    release); if the data has none, there is no head for them.
    """

    fallback_labels = 0

    def __init__(self, sizes: UniterSizes, num_labels: int) -> None:
        super().__init__(sizes, num_labels)
        self._heads: dict[str, tuple[Reads, Callable[[Encoded], ModelOutput]]] = {
            "words": ("masked_tokens", self._words),
            "features": ("masked_regions", self._features),
            "matched": ("pooled", self._match),
            "aligned": ("all", self._aligned_match),
        }
        if num_labels:
            self._heads["objects"] = ("masked_regions", self._classes)
        self.register_load_state_dict_post_hook(_clear_unmasked_row)  # type: ignore[no-untyped-call]
        _clear_unmasked_row(self)

    def add_head(self) -> None:
        """Add the heads."""
        embeddings, hidden = self.uniter.embeddings, self.sizes.hidden_size
        self.cls = nn.ModuleDict({"predictions": WordPrediction(embeddings.word_embeddings)})
        self.feat_regress = FeatureRegression(self.uniter.img_embeddings.img_linear)
        if self.num_labels:
            self.region_classifier = RegionClassifier(hidden, self.num_labels)
        self.itm_output = nn.Linear(hidden, 2)

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> ModelOutput:
        """Predict the targets of the batch's objective.

        Raises:
            DataError: the batch lacks text, features, boxes or masks, or the model has no head for its objective.
        """
        reads, head = head_of(batch, self._heads)
        if reads.startswith("masked"):
            required_mask(reads, batch)
        encoded = self.encode(batch, reads, hidden_states, attentions)
        states = tuple(encoded.states) if hidden_states else ()
        return replace(head(encoded), hidden_states=states, attentions=encoded.attentions)

    def score(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Score whether each text matches its image: ``[B, 2]``."""
        pooled = self.pooled(encoded)
        return self.itm_output(pooled), pooled

    def perturbation_points(self) -> Mapping[str, Point]:
        """Return the points of ``Uniter``, with masked regions excluded, whose features are not read."""
        points = super().perturbation_points()
        return {**points, "image": replace(points["image"], mask=self.layout.visible_regions, confined=True)}

    def _words(self, encoded: Encoded) -> ModelOutput:
        return ModelOutput(self.cls["predictions"](encoded.read))

    def _features(self, encoded: Encoded) -> ModelOutput:
        return ModelOutput(self.feat_regress(encoded.read))

    def _classes(self, encoded: Encoded) -> ModelOutput:
        return ModelOutput(self.region_classifier(encoded.read))

    def _match(self, encoded: Encoded) -> ModelOutput:
        return ModelOutput(*self.score(encoded))

    def _aligned_match(self, encoded: Encoded) -> ModelOutput:
        rows, words, regions = encoded.rows, encoded.words, encoded.regions
        masks = given_mask(rows.text_mask, words[..., 0]), given_mask(rows.region_mask, regions[..., 0])
        return replace(self._match(encoded), extras={"transport": align(words, regions, *masks).distance})


def _clear_unmasked_row(model: nn.Module, _: Any = None) -> None:
    """Zero the row of the mask embedding that is added to unmasked regions, as the release does on use."""
    assert isinstance(model, UniterForPretraining)
    with torch.no_grad():
        model.uniter.img_embeddings.mask_embedding.weight[0] = 0
