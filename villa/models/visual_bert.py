"""VisualBERT (arXiv 1908.03557) on transformers' modules: tokens and regions in one BERT."""

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
from villa.models.attention import ExampleAttention, check_single, of_regions
from villa.models.base import ModelOutput, Point, layer_points
from villa.models.dropout import Dropout
from villa.models.matching import Matching
from villa.models.packing import Blocks, PaddingFree, RowMask, Stream, attend_in_rows, run_layers
from villa.models.rows import RowLayout, Rows, given_mask
from villa.models.two_heads import OneStreamConfig, TwoHeadModel, score_mask, settle
from villa.registry import register_model


@dataclass
class VisualBertConfig(OneStreamConfig):
    """Options of VisualBERT.

    Attributes:
        feature_dim: width of the region features; None takes the data's.
    """

    name: str = "visual_bert"
    feature_dim: int | None = None

    def check(self, *sizes: str) -> None:
        """Check that the options are consistent."""
        super().check("feature_dim", *sizes)

    def transformer(self, facts: DataFacts) -> Any:
        """Return the transformers configuration.

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
class VisualBert(TwoHeadModel):
    """VisualBERT with an answer head, or the head for two images (NLVR2).

    Parameters have their names in transformers: those of ``VisualBertModel`` below ``visual_bert``, and the head's
    ``cls``. The answer head reads the last token before the final [SEP]. The head for two images, whose regions are
    concatenated with types 0 and 1 (``nlvr_dataset.py`` of uclanlp/visualbert@e49b619), reads the pooled output.

    Args:
        config: transformers configuration, with ``num_labels``.
        images: images per example.
        padding_free: see ``TwoHeadConfig``.
    """

    Config = VisualBertConfig

    def __init__(self, config: Any, *, images: int, padding_free: PaddingFree = "auto") -> None:
        super().__init__(padding_free)
        from transformers import VisualBertModel

        self.images = images
        self.layout = RowLayout(images, joint=images > 1, typed_images=images > 1)
        self.visual_bert: Any = VisualBertModel(config)
        layers: Any = self.visual_bert.encoder.layer
        for layer in layers:
            attend_in_rows(layer.attention.self)
        self.dropout = Dropout(config.hidden_dropout_prob)
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
        return cls(config.transformer(facts), images=config.images, padding_free=config.padding_free)

    def load_weights(self, source: str, matching: Matching | None = None) -> LoadReport:
        """Load the weights that ``model.checkpoint`` names.

        Region types and positions start from those of text if a BERT's file has none, as in the release.
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
            every layer, ``[B, T + R, hidden]``, and the attention maps of every layer.

        Raises:
            DataError: the batch lacks text or features, or they do not fit the model.
        """
        rows = self._rows(batch)
        embedded = self.visual_bert.embeddings(
            rows.input_ids,
            token_type_ids=rows.token_types.expand_as(rows.input_ids),
            visual_embeds=rows.features,
            visual_token_type_ids=self._types(rows),
        )
        (packing,) = self.packings(Stream(embedded, _both_masks(rows)), attentions=attentions)
        first, whole = packing.first, hidden_states or attentions
        chosen = first if self.images > 1 else torch.cat((first, first + _last(rows)))
        states, maps = run_layers(
            self.visual_bert.encoder.layer,
            packing.origin.collect(embedded),
            RowMask(score_mask(packing.mask, embedded), packing.blocks),
            None if whole else chosen,
            attentions=attentions,
        )
        read = states[-1].index_select(0, chosen) if whole else states[-1]
        pooled = self.visual_bert.pooler(read[: len(first)].unsqueeze(1))
        logits = self.cls(self.dropout(pooled if self.images > 1 else read[len(first) :]))
        layers = tuple(map(packing.origin.spread, states)) if hidden_states else ()
        return ModelOutput(logits, pooled, layers, tuple(maps))

    def attention_maps(self, batch: Batch) -> list[ExampleAttention]:
        """Return what every layer attends to in each example."""
        check_single(self.images, batch)
        output = self(batch, hidden_states=True, attentions=True)
        return of_regions(self._rows(batch), output.attentions, output.hidden_states, packed=False)

    def pretrained(self) -> Any:
        """Return the transformers model with the same head, sharing the parameters."""
        from transformers import VisualBertForQuestionAnswering, VisualBertForVisualReasoning

        kind: Any = VisualBertForQuestionAnswering if self.images == 1 else VisualBertForVisualReasoning
        with torch.device("meta"):
            whole = kind(copy.deepcopy(self.visual_bert.config))
        whole.visual_bert, whole.cls = self.visual_bert, self.cls
        return whole

    def perturbation_points(self) -> Mapping[str, Point]:
        """Return the looked-up word embedding (text) and the region features before their projection (image)."""
        embeddings = "visual_bert.embeddings"
        return {
            "text": Point(f"{embeddings}.word_embeddings", "output", self.layout.text_mask),
            "image": Point(f"{embeddings}.visual_projection", "input", self.layout.region_mask),
        }

    def other_points(self) -> Mapping[str, Point]:
        """Return the inputs of the layers, at text and at regions."""
        layers = [f"visual_bert.encoder.layer.{n}" for n in range(self.visual_bert.config.num_hidden_layers)]
        masks = {"text": self.layout.text_places, "image": self.layout.region_places}
        return layer_points(layers, masks, blocks=self._places)

    def _places(self, batch: Batch) -> Blocks:
        """Return where the positions that layers compute are in text followed by regions."""
        rows = self._rows(batch)
        both = torch.cat((rows.input_ids, rows.features[..., 0]), dim=1)
        return self.packings(Stream(both, _both_masks(rows)), attentions=False)[0].origin

    def head_prefixes(self) -> tuple[str, ...]:
        """Return the prefix of the classifier."""
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
        """Return the region types ``[B, R]``: 1 for one image, 0 and 1 for two."""
        types = rows.image_types if self.images == 1 else rows.image_types - 1
        return types.expand(rows.features.shape[:2])


def _both_masks(rows: Rows) -> Tensor | None:
    """Return ``[B, T + R]`` bool, or None when all positions are real."""
    if rows.text_mask is None and rows.region_mask is None:
        return None
    text = given_mask(rows.text_mask, rows.input_ids)
    return torch.cat((text, given_mask(rows.region_mask, rows.features[..., 0])), dim=1)


def _last(rows: Rows) -> Tensor:
    """Return the index ``[B]`` of the last token before the final one."""
    return (given_mask(rows.text_mask, rows.input_ids).sum(dim=1) - 2).clamp(min=0)
