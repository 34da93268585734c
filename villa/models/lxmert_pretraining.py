"""LXMERT with its pre-training heads; every batch names the objective that selects one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from villa.batch import Batch
from villa.errors import ConfigError
from villa.facts import DataFacts
from villa.models.base import ModelOutput, Point
from villa.models.lxmert import Lxmert, LxmertConfig, LxmertEncoded
from villa.models.packing import PaddingFree
from villa.models.two_heads import settle
from villa.models.uniter.pretraining import Transform, WordPrediction, head_of, required_mask
from villa.objectives import LXMERT_PARTS, asked_parts
from villa.registry import register_model

#: Part of each head; objective ``lxmert`` has all parts that a batch has targets for.
_HEADS: dict[str, str | None] = {**{part: part for part in LXMERT_PARTS}, "lxmert": None}
#: Released names of the region decoders.
_DECODERS = {"objects": "obj", "attributes": "attr", "features": "feat"}


@dataclass
class LxmertPretrainingConfig(LxmertConfig):
    """Options of LXMERT in pre-training.

    Attributes:
        num_labels: object classes of regions (1,600 in the release); None takes the data's.
        num_attributes: attribute classes of regions.
        num_answers: answers to questions.
    """

    name: str = "lxmert_pretraining"
    num_attributes: int = 400
    num_answers: int = 9500

    def check(self, *sizes: str) -> None:
        """Check that the options are consistent."""
        super().check("num_attributes", "num_answers", *sizes)
        if self.head != "answers":
            raise ConfigError(f"model.head='{self.head}' does not exist in pre-training; leave it out")


@register_model("lxmert_pretraining")
class LxmertForPretraining(Lxmert):
    """LXMERT that predicts the targets of the batch's objective.

    The logits are those of a single part, or, for ``lxmert``, those of all parts, in ``extras``:
    ``words [N, vocabulary]`` of the N masked tokens; ``objects [M, labels]``, ``attributes [M, attributes]`` and
    ``features [M, feature_dim]`` of the M masked regions; ``matched [B, 2]``; ``answers [B, answers]``. The heads have
    the released names ``cls``, ``obj_predict_head`` and ``answer_head``.

    Args:
        config: transformers configuration.
        num_labels: object classes.
        num_attributes: attribute classes.
        num_answers: answers.
        released: see ``LxmertConfig``.
        padding_free: see ``TwoHeadConfig``.
    """

    Config = LxmertPretrainingConfig

    def __init__(
        self,
        config: Any,
        *,
        num_labels: int,
        num_attributes: int,
        num_answers: int,
        released: bool = False,
        padding_free: PaddingFree = "auto",
    ) -> None:
        super().__init__(config, images=1, num_labels=num_answers, released=released, padding_free=padding_free)
        self.answer_head = nn.ModuleDict({"logit_fc": self.logit_fc})
        del self.logit_fc
        hidden = config.hidden_size
        self.cls = nn.ModuleDict(
            {
                "predictions": WordPrediction(self.lxmert.embeddings.word_embeddings),
                "seq_relationship": nn.Linear(hidden, 2),
            }
        )
        widths = {"obj": num_labels, "attr": num_attributes, "feat": config.visual_feat_dim}
        decoders = nn.ModuleDict({name: nn.Linear(hidden, width) for name, width in widths.items()})
        self.obj_predict_head = nn.ModuleDict({"transform": Transform(hidden), "decoder_dict": decoders})
        self.cls.apply(self._initialise)
        self.obj_predict_head.apply(self._initialise)

    @classmethod
    def from_config(cls, config: LxmertPretrainingConfig, facts: DataFacts) -> LxmertForPretraining:  # type: ignore[override]
        """Build the model with all heads and fresh weights.

        Raises:
            ConfigError: the configuration contradicts the data or itself.
        """
        config.check()
        return cls(
            config.transformer(facts),
            num_labels=settle("model.num_labels", config.num_labels, facts.num_labels),
            num_attributes=config.num_attributes,
            num_answers=config.num_answers,
            released=config.released,
            padding_free=config.padding_free,
        )

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> ModelOutput:
        """Predict the targets of the batch's objective; states and attention maps as in ``Lxmert.forward``.

        Raises:
            DataError: the batch lacks text, features, boxes or masks, or the model has no head for its objective.
        """
        part = head_of(batch, _HEADS)
        encoded = self.encode(batch, attentions)
        asked = asked_parts(batch) if part is None else [part]
        scores = {name: self._score(name, encoded, batch) for name in asked}
        logits = scores.get("matched", scores[asked[0]])
        output = ModelOutput(logits, encoded.pooled, extras=scores if part is None else {})
        return replace(
            output, hidden_states=tuple(encoded.text) if hidden_states else (), attentions=encoded.attentions
        )

    def perturbation_points(self) -> Mapping[str, Point]:
        """Return the points of ``Lxmert``, with masked regions excluded."""
        points = super().perturbation_points()
        return {**points, "image": replace(points["image"], mask=self.layout.visible_regions, confined=True)}

    def head_prefixes(self) -> tuple[str, ...]:
        """Return none: the heads have no learning rate of their own in the release."""
        return ()

    def _score(self, part: str, encoded: LxmertEncoded, batch: Batch) -> Tensor:
        """Return the logits of a part."""
        if part == "words":
            words: Tensor = self.cls["predictions"](encoded.text[-1][required_mask("masked_tokens", batch)])
            return words
        if part in _DECODERS:
            return self._regions(_DECODERS[part], encoded.regions[required_mask("masked_regions", batch)])
        head: Callable[[Tensor], Tensor] = (
            self.cls["seq_relationship"] if part == "matched" else self.answer_head["logit_fc"]
        )
        return head(encoded.pooled)

    def _regions(self, decoder: str, states: Tensor) -> Tensor:
        decoders: Any = self.obj_predict_head["decoder_dict"]
        scores: Tensor = decoders[decoder](self.obj_predict_head["transform"](states))
        return scores
