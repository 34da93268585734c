"""A small model: words and regions are averaged, and a two-layer network scores the labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from villa.batch import Batch
from villa.errors import ConfigError
from villa.models.base import DataFacts, Model, ModelConfig, ModelOutput, Point
from villa.registry import register_model


@dataclass
class AverageConfig(ModelConfig):
    """Options: the hidden size."""

    hidden_size: int = 32


@register_model("average")
class AverageModel(Model):
    """Averages word embeddings and projected region features over real positions."""

    Config = AverageConfig

    def __init__(self, config: AverageConfig, vocab_size: int, feature_dim: int, num_labels: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, config.hidden_size)
        self.regions = nn.Linear(feature_dim, config.hidden_size)
        self.head = nn.Sequential(nn.Linear(2 * config.hidden_size, 64), nn.GELU(), nn.Linear(64, num_labels))

    @classmethod
    def from_config(cls, config: Any, facts: DataFacts) -> AverageModel:
        """Build the model; the data fixes the sizes of its ends."""
        if facts.vocab_size is None or facts.feature_dim is None or facts.num_labels is None:
            raise ConfigError("model 'average' needs text, region features and labels: choose data with all of them")
        return cls(config, facts.vocab_size, facts.feature_dim, facts.num_labels)

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> ModelOutput:
        """Score a batch: logits ``[B, labels]``."""
        words = _average(self.words(batch.input_ids), batch.attention_mask)
        regions = _average(self.regions(batch.features), batch.region_mask)
        pooled = torch.cat((words, regions), dim=-1)
        return ModelOutput(logits=self.head(pooled), pooled=pooled)

    def perturbation_points(self) -> Mapping[str, Point]:
        """Word embeddings as they leave the table, region features before their projection."""
        return {
            "text": Point("words", "output", lambda batch: batch.attention_mask),
            "image": Point("regions", "input", lambda batch: batch.region_mask),
        }


def _average(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of ``[B, N, D]`` over the positions where ``mask [B, N]`` is True."""
    assert mask is not None
    weights = mask.unsqueeze(-1).to(values.dtype)
    return (values * weights).sum(1) / weights.sum(1)
