"""Options of UNITER, and the registry of its task heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from villa.errors import ConfigError
from villa.facts import DataFacts
from villa.models.base import ModelConfig
from villa.models.packing import PaddingFree
from villa.models.two_heads import require_positive, settle
from villa.registry import Registry

#: Epsilon of every LayerNorm of the release.
LAYER_NORM_EPS = 1e-12


@dataclass(frozen=True)
class UniterSizes:
    """Sizes of UNITER's modules, with the released configuration's names in brackets.

    Attributes:
        vocab_size: rows of the word embedding.
        feature_dim: width of the region features (``img_dim``).
        hidden_size: width of the transformer.
        num_layers: transformer layers (``num_hidden_layers``).
        num_heads: attention heads (``num_attention_heads``).
        intermediate_size: width of the feed-forward layers.
        max_positions: longest text in tokens (``max_position_embeddings``).
        type_vocab_size: rows of the type embedding.
        hidden_dropout: dropout after embeddings and linear layers (``hidden_dropout_prob``).
        attention_dropout: dropout of attention weights (``attention_probs_dropout_prob``).
        initializer_range: standard deviation of fresh weights.
        padding: id of the padding token, whose row of the word embedding is not trained.
        padding_free: whether layers leave padding out.
    """

    vocab_size: int
    feature_dim: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    type_vocab_size: int
    hidden_dropout: float
    attention_dropout: float
    initializer_range: float
    padding: int = 0
    padding_free: PaddingFree = "auto"


#: Task heads by name: subclasses of ``Uniter``; ``@register_head`` adds one.
HEADS: Registry[Any] = Registry(
    "head",
    "villa.models.uniter.model:Uniter",
    {
        "classification": "villa.models.uniter.heads",
        "multiple_choice": "villa.models.uniter.heads",
        "nlvr2_paired": "villa.models.uniter.heads",
        "nlvr2_paired_attn": "villa.models.uniter.heads",
        "nlvr2_triplet": "villa.models.uniter.heads",
        "pretraining": "villa.models.uniter.pretraining",
        "ranking": "villa.models.uniter.heads",
        "regions": "villa.models.uniter.heads",
        "regions_mlp": "villa.models.uniter.heads",
    },
)
register_head = HEADS.register

_NAMED_SIZES = {
    "base": {"hidden_size": 768, "num_layers": 12, "num_heads": 12},
    "large": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16},
}


@dataclass
class UniterConfig(ModelConfig):
    """Options of UNITER.

    Attributes:
        head: registered task head.
        size: ``base`` (12 layers of 768) or ``large`` (24 of 1024), unless overridden below.
        hidden_size: width of the transformer.
        num_layers: transformer layers.
        num_heads: attention heads.
        intermediate_size: width of the feed-forward layers; None means four times ``hidden_size``.
        vocab_size: rows of the word embedding; None takes the data's.
        num_labels: classes of the head; None takes the data's, or the head's default.
        feature_dim: width of the region features; None takes the data's.
        type_vocab_size: rows of the type embedding; None takes the head's default (2; 4 for VCR; 3 for NLVR2).
        max_positions: longest text in tokens.
        hidden_dropout: dropout after embeddings and linear layers.
        attention_dropout: dropout of attention weights.
        initializer_range: standard deviation of fresh weights.
        padding_free: ``on`` computes layers without padding, besides attention, ``off`` with it; ``auto`` leaves it out
            where there is enough of it to save time. Logits are the same.
    """

    head: str = "classification"
    size: Literal["base", "large"] = "base"
    hidden_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    intermediate_size: int | None = None
    vocab_size: int | None = None
    num_labels: int | None = None
    feature_dim: int | None = None
    type_vocab_size: int | None = None
    max_positions: int = 512
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02
    padding_free: PaddingFree = "auto"

    def check(self) -> None:
        """Check that the options are consistent.

        Raises:
            ConfigError: a head or size is unknown, or a number is out of range.
        """
        HEADS.get(self.head)
        shape = self.shape()
        require_positive(
            **shape,
            vocab_size=self.vocab_size,
            num_labels=self.num_labels,
            feature_dim=self.feature_dim,
            max_positions=self.max_positions,
        )
        if shape["hidden_size"] % shape["num_heads"]:
            raise ConfigError(
                f"model.hidden_size={shape['hidden_size']} is not divisible by "
                f"num_heads={shape['num_heads']}: set model.num_heads to a divisor"
            )
        if self.type_vocab_size is not None and self.type_vocab_size < 2:
            raise ConfigError(f"model.type_vocab_size={self.type_vocab_size}: text and image need 2 types")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)} is not in [0, 1)")
        if self.initializer_range < 0:
            raise ConfigError(f"model.initializer_range={self.initializer_range} is negative")

    def shape(self) -> dict[str, int]:
        """Return the sizes of the transformer, with defaults from ``size``.

        Raises:
            ConfigError: unknown size.
        """
        if self.size not in _NAMED_SIZES:
            raise ConfigError(f"model.size='{self.size}' is not known (known: {', '.join(_NAMED_SIZES)})")
        named = _NAMED_SIZES[self.size]
        shape = {key: value if getattr(self, key) is None else getattr(self, key) for key, value in named.items()}
        inner = self.intermediate_size
        return {**shape, "intermediate_size": 4 * shape["hidden_size"] if inner is None else inner}

    def sizes(self, facts: DataFacts, types: int) -> UniterSizes:
        """Return the sizes of all modules.

        Args:
            facts: facts of the data.
            types: rows of the type embedding if the recipe does not give them.

        Raises:
            ConfigError: a number contradicts the data or is not known.
        """
        return UniterSizes(
            vocab_size=settle("model.vocab_size", self.vocab_size, facts.vocab_size),
            feature_dim=settle("model.feature_dim", self.feature_dim, facts.feature_dim),
            type_vocab_size=types if self.type_vocab_size is None else self.type_vocab_size,
            max_positions=self.max_positions,
            hidden_dropout=self.hidden_dropout,
            attention_dropout=self.attention_dropout,
            initializer_range=self.initializer_range,
            padding=0 if facts.padding is None else facts.padding,
            padding_free=self.padding_free,
            **self.shape(),
        )
