"""VisualBERT (arXiv 1908.03557) on the modules of transformers: words and regions in one BERT."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from villa.batch import Batch
from villa.checkpoints.load_report import LoadReport
from villa.errors import DataError
from villa.facts import DataFacts
from villa.models.base import Model, ModelOutput, Point
from villa.models.matching import Matching
from villa.models.rows import RowLayout, Rows, given_mask
from villa.models.two_heads import OneStreamConfig, score_mask, settle
from villa.registry import register_model


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


_TABLES = ("token_type_embeddings", "position_embeddings")


@register_model("visual_bert")
class VisualBert(Model):
    """VisualBERT with the head that scores answers, or the one for two images (NLVR2).

    Parameters carry the names that transformers gives them: those of ``VisualBertModel`` below ``visual_bert``, and the
    head's ``cls``. The head for answers reads the last token before the one that ends the text; the one for two images,
    whose regions lie side by side and have the types 0 and 1 (``nlvr_dataset.py`` of uclanlp/visualbert@e49b619), reads
    the pooled first token.

    Args:
        config: configuration object of transformers, with ``num_labels``.
        images: images an example.
    """

    Config = VisualBertConfig

    def __init__(self, config: Any, *, images: int) -> None:
        super().__init__()
        from transformers import VisualBertModel

        self.images = images
        self.layout = RowLayout(images, joint=images > 1, typed_images=images > 1)
        self.visual_bert: Any = VisualBertModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.cls = nn.Linear(config.hidden_size, config.num_labels)
        nn.init.normal_(self.cls.weight, std=config.initializer_range)
        nn.init.zeros_(self.cls.bias)

    @classmethod
    def from_config(cls, config: VisualBertConfig, facts: DataFacts) -> VisualBert:
        """Build the model with the configured head and fresh weights.

        Raises:
            ConfigError: the configuration contradicts the data or itself.
        """
        config.check()
        return cls(config.transformer(facts), images=config.images)

    def load_weights(self, source: str, matching: Matching | None = None) -> LoadReport:
        """Load the weights that ``model.checkpoint`` names; see the base class.

        The types and positions of regions start from those of text where a BERT's file has none, as in the release.
        """
        report = super().load_weights(source, matching)
        notes = {}
        for table in _TABLES:
            ours, theirs = (f"visual_bert.embeddings.{prefix}{table}.weight" for prefix in ("visual_", ""))
            if ours in report.missing:
                with torch.no_grad():
                    self.get_parameter(ours).copy_(self.get_parameter(theirs))
                notes[ours] = f"{ours} from {theirs}"
        missing = tuple(name for name in report.missing if name not in notes)
        return replace(report, missing=missing, derived=(*report.derived, *notes.values()))

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> ModelOutput:
        """Score a batch of texts and image regions.

        Returns:
            Logits ``[B, labels]``; the pooled output ``[B, hidden]``; on request the states after the embedding and
            every layer, ``[B, T + R, hidden]`` of tokens and regions, and the attention maps of every layer.

        Raises:
            DataError: the batch lacks text or features, or they do not suit the model.
        """
        rows = self._rows(batch)
        embedded = self.visual_bert.embeddings(
            rows.input_ids,
            token_type_ids=rows.token_types.expand_as(rows.input_ids),
            visual_embeds=rows.features,
            visual_token_type_ids=self._types(rows),
        )
        encoded = self.visual_bert.encoder(
            embedded,
            score_mask(_both_masks(rows), embedded),
            output_attentions=attentions,
            output_hidden_states=hidden_states,
        )
        states = encoded.last_hidden_state
        pooled = self.visual_bert.pooler(states)
        read = pooled if self.images > 1 else states[torch.arange(len(states), device=states.device), _last(rows)]
        logits = self.cls(self.dropout(read))
        return ModelOutput(logits, pooled, encoded.hidden_states or (), encoded.attentions or ())

    def pretrained(self) -> Any:
        """The model of transformers with the same head."""
        from transformers import VisualBertForQuestionAnswering, VisualBertForVisualReasoning

        kind: Any = VisualBertForQuestionAnswering if self.images == 1 else VisualBertForVisualReasoning
        with torch.device("meta"):
            whole = kind(copy.deepcopy(self.visual_bert.config))
        whole.visual_bert, whole.cls = self.visual_bert, self.cls
        return whole

    def perturbation_points(self) -> Mapping[str, Point]:
        """Text: the looked-up word embedding. Image: the region feature before its projection."""
        embeddings = "visual_bert.embeddings"
        return {
            "text": Point(f"{embeddings}.word_embeddings", "output", self.layout.text_mask),
            "image": Point(f"{embeddings}.visual_projection", "input", self.layout.region_mask),
        }

    def head_prefixes(self) -> tuple[str, ...]:
        """The classifier."""
        return ("cls",)

    def _rows(self, batch: Batch) -> Rows:
        rows = self.layout.rows(batch)
        longest, length = self.visual_bert.config.max_position_embeddings, rows.input_ids.shape[1]
        if batch.input_ids is not None and batch.input_ids.dim() != 2:
            raise DataError("VisualBERT reads one text an example; use another model for this data")
        if length > longest:
            raise DataError(f"a text has {length} tokens, but the model has {longest} positions; cut texts to it")
        return rows

    def _types(self, rows: Rows) -> Tensor:
        """``[B, R]`` types of the regions: 1 for one image, 0 and 1 for two."""
        types = rows.image_types if self.images == 1 else rows.image_types - 1
        return types.expand(rows.features.shape[:2])


def _both_masks(rows: Rows) -> Tensor | None:
    """``[B, T + R]`` bool, or None when all positions are real."""
    if rows.text_mask is None and rows.region_mask is None:
        return None
    text = given_mask(rows.text_mask, rows.input_ids)
    return torch.cat((text, given_mask(rows.region_mask, rows.features[..., 0])), dim=1)


def _last(rows: Rows) -> Tensor:
    """``[B]`` place of the last token before the one that ends the text."""
    return (given_mask(rows.text_mask, rows.input_ids).sum(dim=1) - 2).clamp(min=0)
