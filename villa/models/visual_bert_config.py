"""Options of VisualBERT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from villa.models.base import DataFacts
from villa.models.settling import settle
from villa.models.two_heads import OneStreamConfig


@dataclass
class VisualBertConfig(OneStreamConfig):
    """Options of VisualBERT, besides those that it shares with others.

    Attributes:
        feature_dim: width of a region feature; None takes the data's.
    """

    name: str = "visual_bert"
    feature_dim: int | None = None

    def check(self, *sizes: str) -> None:
        """Check the numbers against each other; see the base class."""
        super().check("feature_dim", *sizes)

    def transformer(self, facts: DataFacts) -> Any:
        """Return the configuration object of transformers.

        Raises:
            ConfigError: a number contradicts the data or is not known.
        """
        from transformers import VisualBertConfig as TransformerConfig

        return TransformerConfig(
            visual_embedding_dim=settle("model.feature_dim", self.feature_dim, facts.feature_dim),
            **self.shared_options(facts),
        )
