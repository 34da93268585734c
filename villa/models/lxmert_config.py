"""Options of LXMERT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from villa.errors import ConfigError
from villa.models.base import DataFacts, ModelConfig
from villa.models.settling import require_positive, settle

#: Images that each head reads an example.
HEAD_IMAGES = {"answers": 1, "nlvr2": 2}
#: Classes of NLVR2: false, true.
NLVR2_LABELS = 2


@dataclass
class LxmertConfig(ModelConfig):
    """Options of LXMERT; the numbers left alone are those of the released base model.

    Attributes:
        head: ``answers`` scores the answers to a question about an image (VQA, GQA); ``nlvr2`` says whether a
            sentence is true of two images.
        hidden_size: width of the transformer.
        language_layers: layers over the text.
        vision_layers: layers over the regions.
        cross_layers: layers in which both read each other.
        num_heads: attention heads.
        intermediate_size: width inside a layer; None is four times ``hidden_size``.
        vocab_size: rows of the word embedding; None takes the data's.
        num_labels: classes of the head; None takes the data's.
        feature_dim: width of a region feature; None takes the data's.
        box_dim: numbers of a box that are read: x1, y1, x2, y2 for 4.
        max_positions: longest text in tokens.
        type_vocab_size: rows of the type embedding.
        hidden_dropout: dropout after embeddings and linear maps.
        attention_dropout: dropout of attention weights.
        initializer_range: standard deviation of fresh weights.
        released: compute as the released code does: the embeddings of position 0 and of type 0 are never trained,
            and masked attention scores are lowered by 10,000 instead of the largest number.
    """

    name: str = "lxmert"
    head: Literal["answers", "nlvr2"] = "answers"
    hidden_size: int = 768
    language_layers: int = 9
    vision_layers: int = 5
    cross_layers: int = 5
    num_heads: int = 12
    intermediate_size: int | None = None
    vocab_size: int | None = None
    num_labels: int | None = None
    feature_dim: int | None = None
    box_dim: int = 4
    max_positions: int = 512
    type_vocab_size: int = 2
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02
    released: bool = False

    def check(self) -> None:
        """Check the numbers against each other.

        Raises:
            ConfigError: a head that does not exist, or a number that no model can have.
        """
        if self.head not in HEAD_IMAGES:
            raise ConfigError(f"model.head='{self.head}' is not known (known: {', '.join(HEAD_IMAGES)})")
        numbers = ("hidden_size", "language_layers", "vision_layers", "cross_layers", "num_heads", "intermediate_size")
        sizes = ("vocab_size", "num_labels", "feature_dim", "box_dim", "max_positions", "type_vocab_size")
        require_positive(**{name: getattr(self, name) for name in (*numbers, *sizes)})
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}: set "
                "model.num_heads to a divisor"
            )
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)} is not in [0, 1)")
        if self.initializer_range < 0:
            raise ConfigError(f"model.initializer_range={self.initializer_range} is negative")

    def labels(self, facts: DataFacts) -> int:
        """Classes of the head.

        Raises:
            ConfigError: they are not known, or not those of the head.
        """
        found = facts.num_labels
        if self.head == "nlvr2":
            found = NLVR2_LABELS if found is None else found
        labels = settle("model.num_labels", self.num_labels, found)
        if self.head == "nlvr2" and labels != NLVR2_LABELS:
            raise ConfigError(f"head 'nlvr2' has {NLVR2_LABELS} classes, but the data has {labels}")
        return labels

    def transformer(self, facts: DataFacts) -> Any:
        """Return the configuration object of transformers.

        Raises:
            ConfigError: a number contradicts the data or is not known.
        """
        from transformers import LxmertConfig as TransformerConfig

        return TransformerConfig(
            vocab_size=settle("model.vocab_size", self.vocab_size, facts.vocab_size),
            visual_feat_dim=settle("model.feature_dim", self.feature_dim, facts.feature_dim),
            visual_pos_dim=self.box_dim,
            hidden_size=self.hidden_size,
            l_layers=self.language_layers,
            r_layers=self.vision_layers,
            x_layers=self.cross_layers,
            num_attention_heads=self.num_heads,
            intermediate_size=4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size,
            max_position_embeddings=self.max_positions,
            type_vocab_size=self.type_vocab_size,
            hidden_dropout_prob=self.hidden_dropout,
            attention_probs_dropout_prob=self.attention_dropout,
            initializer_range=self.initializer_range,
        )
