"""The prediction heads of pre-training, under the released parameter names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from villa.batch import Batch
from villa.errors import DataError
from villa.models.uniter_sizes import LAYER_NORM_EPS

T = TypeVar("T")


class Transform(nn.Module):
    """Linear map, GELU and LayerNorm before a decoder (BERT)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, states: Tensor) -> Tensor:
        """``[N, hidden]`` to ``[N, hidden]``."""
        normalised: Tensor = self.LayerNorm(F.gelu(self.dense(states)))
        return normalised


class WordPrediction(nn.Module):
    """Scores of all words; the decoder shares the weight of the word embedding."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        words, hidden_size = embedding.weight.shape
        self.transform = Transform(hidden_size)
        self.decoder = nn.Linear(hidden_size, words, bias=False)
        self.decoder.weight = embedding.weight
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, states: Tensor) -> Tensor:
        """``[N, hidden]`` to ``[N, vocabulary]``."""
        return F.linear(self.transform(states), self.decoder.weight, self.bias)


class FeatureRegression(nn.Module):
    """Features of regions; the last map is the transpose of the features' projection, and shares its weight."""

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.net = region_transform(projection.out_features)
        self.weight = projection.weight
        self.bias = nn.Parameter(torch.zeros(projection.in_features))

    def forward(self, states: Tensor) -> Tensor:
        """``[M, hidden]`` to ``[M, feature_dim]``."""
        return F.linear(self.net(states), self.weight.t(), self.bias)


class RegionClassifier(nn.Module):
    """Scores of the detector's classes."""

    def __init__(self, hidden_size: int, classes: int) -> None:
        super().__init__()
        self.net = region_transform(hidden_size).append(nn.Linear(hidden_size, classes))

    def forward(self, states: Tensor) -> Tensor:
        """``[M, hidden]`` to ``[M, classes]``."""
        scores: Tensor = self.net(states)
        return scores


def region_transform(hidden_size: int) -> nn.Sequential:
    """Linear map, GELU and LayerNorm, as ``net.0`` and ``net.2``."""
    return nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS))


def head_of(batch: Batch, heads: Mapping[str, T]) -> T:
    """Return what a model has for the objective of a batch.

    Raises:
        DataError: nothing.
    """
    objective = batch.objective or ""
    if objective not in heads:
        given = f"objective '{objective}'" if objective else "no objective"
        raise DataError(
            f"the batch is for {given}, but the model has heads for {', '.join(heads)}; use a data set of one of "
            "these, or the head of the task"
        )
    return heads[objective]


def required_mask(name: str, batch: Batch) -> Tensor:
    """Return ``masked_tokens`` or ``masked_regions`` of a batch.

    Raises:
        DataError: it has none.
    """
    mask: Tensor | None = getattr(batch, name)
    if mask is None:
        raise DataError(f"the batch is for objective '{batch.objective}' but has no {name} (first: '{batch.ids[0]}')")
    return mask
