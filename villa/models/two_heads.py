"""Options of models with an answer head and an NLVR2 head, and their attention masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from villa.errors import ConfigError
from villa.facts import DataFacts
from villa.models.base import Model, ModelConfig, has_dropout
from villa.models.packing import Packing, PaddingFree, Stream


def settle(option: str, given: int | None, found: int | None) -> int:
    """Return the number that the recipe gives or the data fixes.

    Args:
        option: dotted name of the option, for messages: ``"model.num_labels"``.
        given: the recipe's number, or None.
        found: the data's number, or None.

    Raises:
        ConfigError: they contradict each other, or neither is known.
    """
    if given is not None and found is not None and given != found:
        raise ConfigError(f"{option}={given}, but the data has {found}: remove the option or set it to {found}")
    settled = found if given is None else given
    if settled is None:
        raise ConfigError(f"{option} is not known: the data does not say, so the recipe has to give it")
    return settled


def require_positive(**options: int | None) -> None:
    """Check that every given option of the model is at least 1.

    Raises:
        ConfigError: the first one that is not.
    """
    for name, value in options.items():
        if value is not None and value < 1:
            raise ConfigError(f"model.{name}={value}, but it has to be at least 1")


#: Images per example that each head reads.
HEAD_IMAGES = {"answers": 1, "nlvr2": 2}
#: Classes of NLVR2: false, true.
NLVR2_LABELS = 2


@dataclass
class TwoHeadConfig(ModelConfig):
    """Options of a transformer over text and images; the defaults are those of the released base model.

    Attributes:
        head: ``answers`` scores the answers to a question about an image (VQA, GQA); ``nlvr2`` decides whether a
            sentence is true of two images.
        hidden_size: width of the transformer.
        num_heads: attention heads.
        intermediate_size: width inside a layer; None is four times ``hidden_size``.
        vocab_size: rows of the word embedding; None takes the data's.
        num_labels: classes of the head; None takes the data's.
        max_positions: longest text in tokens.
        type_vocab_size: rows of the type embedding of the text.
        hidden_dropout: dropout after embeddings and linear maps.
        attention_dropout: dropout of attention weights.
        initializer_range: standard deviation of fresh weights.
        padding_free: ``on`` computes layers without padding, besides attention, ``off`` with it; ``auto`` leaves it out
            where there is enough of it to save time. Logits are the same.
    """

    head: Literal["answers", "nlvr2"] = "answers"
    hidden_size: int = 768
    num_heads: int = 12
    intermediate_size: int | None = None
    vocab_size: int | None = None
    num_labels: int | None = None
    max_positions: int = 512
    type_vocab_size: int = 2
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02
    padding_free: PaddingFree = "auto"

    def check(self, *sizes: str) -> None:
        """Check that the options are consistent.

        Args:
            sizes: names of the model's own options that must be positive.

        Raises:
            ConfigError: a head that does not exist, or a number that no model can have.
        """
        if self.head not in HEAD_IMAGES:
            raise ConfigError(f"model.head='{self.head}' is not known (known: {', '.join(HEAD_IMAGES)})")
        shared = ("hidden_size", "num_heads", "intermediate_size", "vocab_size", "num_labels")
        names = (*shared, "max_positions", "type_vocab_size", *sizes)
        require_positive(**{name: getattr(self, name) for name in names})
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

    @property
    def images(self) -> int:
        """Images per example that the head reads."""
        return HEAD_IMAGES[self.head]

    def labels(self, facts: DataFacts) -> int:
        """Return the number of classes of the head.

        Raises:
            ConfigError: it is not known, or does not fit the head.
        """
        pair = self.head == "nlvr2"
        found = NLVR2_LABELS if pair and facts.num_labels is None else facts.num_labels
        labels = settle("model.num_labels", self.num_labels, found)
        if pair and labels != NLVR2_LABELS:
            raise ConfigError(f"head 'nlvr2' has {NLVR2_LABELS} classes, but the data has {labels}")
        return labels

    def shared_options(self, facts: DataFacts) -> dict[str, Any]:
        """Return the options under their names in transformers.

        Raises:
            ConfigError: a number contradicts the data or is not known.
        """
        return {
            "vocab_size": settle("model.vocab_size", self.vocab_size, facts.vocab_size),
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_heads,
            "intermediate_size": 4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size,
            "max_position_embeddings": self.max_positions,
            "type_vocab_size": self.type_vocab_size,
            "hidden_dropout_prob": self.hidden_dropout,
            "attention_probs_dropout_prob": self.attention_dropout,
            "initializer_range": self.initializer_range,
        }


@dataclass
class OneStreamConfig(TwoHeadConfig):
    """Options of a single-stream transformer, whose layers read text and image together.

    Attributes:
        num_layers: transformer layers.
    """

    num_layers: int = 12

    def check(self, *sizes: str) -> None:
        """Check that the options are consistent."""
        super().check("num_layers", *sizes)

    def shared_options(self, facts: DataFacts) -> dict[str, Any]:
        """Return the options under their names in transformers, with the labels, layers and padding id."""
        return super().shared_options(facts) | {
            "num_labels": self.labels(facts),
            "num_hidden_layers": self.num_layers,
            "pad_token_id": 0 if facts.padding is None else facts.padding,
        }


class TwoHeadModel(Model):
    """Base of models on transformers' layers, which may leave padding out.

    Args:
        padding_free: see ``TwoHeadConfig``.
    """

    def __init__(self, padding_free: PaddingFree) -> None:
        super().__init__()
        self.padding_free: PaddingFree = padding_free

    def stochastic(self) -> bool:
        """Return whether there is dropout."""
        return has_dropout(self)

    def packings(self, *streams: Stream, attentions: bool) -> list[Packing]:
        """Return the positions to compute of embedded streams; if attention maps are wanted, these are all."""
        return Packing.of_streams(streams, "off" if attentions else self.padding_free)


def score_mask(mask: Tensor | None, like: Tensor, lowest: float | None = None) -> Tensor | None:
    """Return the additive attention mask ``[N, 1, 1, L]``: 0 on real positions, ``lowest`` on others.

    Args:
        mask: ``[N, L]`` bool, True on real positions; None when all are real.
        like: a tensor of the dtype of the scores.
        lowest: value on masked positions; None for the lowest number of the dtype.
    """
    if mask is None:
        return None
    least = torch.finfo(like.dtype).min if lowest is None else lowest
    return (~mask[:, None, None, :]).to(like.dtype) * least
