"""Options of ViLT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from villa.errors import ConfigError
from villa.models.base import DataFacts
from villa.models.two_heads import OneStreamConfig


@dataclass
class ViltConfig(OneStreamConfig):
    """Options of ViLT, besides those that it shares with others.

    Attributes:
        image_size: side in pixels that the position embedding of the patches is made for; images of other sizes are
            read too, with positions interpolated.
        patch_size: side of a patch in pixels.
        max_positions: longest text in tokens.
        hidden_dropout: dropout after embeddings and linear maps; the release has none.
        attention_dropout: dropout of attention weights; the release has none.
    """

    name: str = "vilt"
    image_size: int = 384
    patch_size: int = 32
    max_positions: int = 40
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0

    def check(self, *sizes: str) -> None:
        """Check the numbers against each other; see the base class."""
        super().check("image_size", "patch_size", *sizes)
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"model.image_size={self.image_size} is no multiple of patch_size={self.patch_size}: set "
                "model.image_size to one"
            )

    def transformer(self, facts: DataFacts) -> Any:
        """Return the configuration object of transformers.

        Raises:
            ConfigError: a number contradicts the data or is not known.
        """
        from transformers import ViltConfig as TransformerConfig

        return TransformerConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            modality_type_vocab_size=1 + self.images,  # text, and each image
            num_images=self.images,
            **self.shared_options(facts),
        )
