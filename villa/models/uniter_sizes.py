"""The numbers that fix the shape of a UNITER."""

from __future__ import annotations

from dataclasses import dataclass

#: Epsilon of every LayerNorm of the release.
LAYER_NORM_EPS = 1e-12


@dataclass(frozen=True)
class UniterSizes:
    """Numbers that fix a UNITER's modules; the names in brackets are the released configuration's.

    Attributes:
        vocab_size: rows of the word embedding.
        feature_dim: width of a region feature (``img_dim``).
        hidden_size: width of the transformer.
        num_layers: transformer layers (``num_hidden_layers``).
        num_heads: attention heads (``num_attention_heads``).
        intermediate_size: width between the two linear maps of a layer.
        max_positions: longest text in tokens (``max_position_embeddings``).
        type_vocab_size: rows of the type embedding.
        hidden_dropout: dropout after embeddings and linear maps (``hidden_dropout_prob``).
        attention_dropout: dropout of attention weights (``attention_probs_dropout_prob``).
        initializer_range: standard deviation of fresh weights.
        padding: row of the word embedding that is not trained: that of the word-piece that texts are padded with.
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
