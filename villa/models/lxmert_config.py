"""Options of LXMERT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from villa.models.base import DataFacts
from villa.models.settling import settle
from villa.models.two_heads import TwoHeadConfig


@dataclass
class LxmertConfig(TwoHeadConfig):
    """Options of LXMERT, besides those that it shares with others.

    Attributes:
        language_layers: layers over the text.
        vision_layers: layers over the regions.
        cross_layers: layers in which both read each other.
        feature_dim: width of a region feature; None takes the data's.
        box_dim: numbers of a box that are read: x1, y1, x2, y2 for 4.
        released: compute as the released code does: the embeddings of position 0 and of type 0 are never trained,
            and masked attention scores are lowered by 10,000 instead of the largest number.
    """

    name: str = "lxmert"
    language_layers: int = 9
    vision_layers: int = 5
    cross_layers: int = 5
    feature_dim: int | None = None
    box_dim: int = 4
    released: bool = False

    def check(self, *sizes: str) -> None:
        """Check the numbers against each other; see the base class."""
        super().check("language_layers", "vision_layers", "cross_layers", "feature_dim", "box_dim", *sizes)

    def transformer(self, facts: DataFacts) -> Any:
        """Return the configuration object of transformers.

        Raises:
            ConfigError: a number contradicts the data or is not known.
        """
        from transformers import LxmertConfig as TransformerConfig

        return TransformerConfig(
            visual_feat_dim=settle("model.feature_dim", self.feature_dim, facts.feature_dim),
            visual_pos_dim=self.box_dim,
            l_layers=self.language_layers,
            r_layers=self.vision_layers,
            x_layers=self.cross_layers,
            pad_token_id=facts.padding or None,
            **self.shared_options(facts),
        )
