"""LXMERT (arXiv 1908.07490) on transformers' modules: a text and a region stream, then cross-attention."""

from __future__ import annotations

import copy
import os.path
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from villa.batch import Batch
from villa.checkpoints.load_report import LoadReport
from villa.checkpoints.transformers_folder import CONFIG_FILE
from villa.errors import CheckpointError, DataError
from villa.facts import DataFacts
from villa.files import read_json
from villa.models.attention import ExampleAttention, LayerMaps, check_single, corners, counts, parts
from villa.models.base import ModelOutput, Point, layer_points
from villa.models.matching import Matching, rows_of
from villa.models.packing import Blocks, PaddingFree, RowMask, States, Stream, attend_in_rows
from villa.models.rows import RowLayout, Rows
from villa.models.transformers_model import load_matched, word_modules
from villa.models.two_heads import TwoHeadConfig, TwoHeadModel, score_mask, settle
from villa.registry import register_model


@dataclass
class LxmertConfig(TwoHeadConfig):
    """Options of LXMERT.

    Attributes:
        language_layers: layers over the text.
        vision_layers: layers over the regions.
        cross_layers: cross-attention layers.
        feature_dim: width of the region features; None takes the data's.
        box_dim: columns of a box that are read: x1, y1, x2, y2 for 4.
        released: compute as the released code does: never train the embeddings of position 0 and type 0, and lower
            masked attention scores by 10,000 instead of the largest number of the dtype.
    """

    name: str = "lxmert"
    language_layers: int = 9
    vision_layers: int = 5
    cross_layers: int = 5
    feature_dim: int | None = None
    box_dim: int = 4
    released: bool = False

    def check(self, *sizes: str) -> None:
        """Check that the options are consistent."""
        super().check("language_layers", "vision_layers", "cross_layers", "feature_dim", "box_dim", *sizes)

    def transformer(self, facts: DataFacts) -> Any:
        """Return the transformers configuration.

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


#: What the released code adds to the attention scores of masked positions.
RELEASED_MASK = -10000.0
_LAYER_NORM_EPS = 1e-12
#: Place of the regions among the arguments of a cross layer.
_SEEN = 2


class LxmertEncoded(NamedTuple):
    """The transformer's output for N rows.

    Attributes:
        text: text states after the embedding and every language and cross layer, ``[N, T, hidden]`` each.
        regions: last region states, ``[N, R, hidden]``.
        pooled: ``[N, hidden]``.
        attentions: see ``Lxmert.forward``.
        examples: number of examples B.
    """

    text: States
    regions: Tensor
    pooled: Tensor
    attentions: tuple[Tensor, ...]
    examples: int


@register_model("lxmert")
class Lxmert(TwoHeadModel):
    """LXMERT with an answer head, or the head for two images (NLVR2).

    The head's parameters have the released names ``logit_fc.{0,2,3}``, the transformer's those of ``LxmertModel``
    below ``lxmert``.

    Args:
        config: transformers configuration.
        images: images per example; the head reads their concatenated pooled outputs.
        num_labels: classes of the head.
        released: see ``LxmertConfig``.
        padding_free: see ``TwoHeadConfig``.
    """

    Config = LxmertConfig

    def __init__(
        self,
        config: Any,
        *,
        images: int,
        num_labels: int,
        released: bool = False,
        padding_free: PaddingFree = "auto",
    ) -> None:
        super().__init__(padding_free)
        from transformers import LxmertModel
        from transformers.models.lxmert.modeling_lxmert import LxmertAttention

        self.layout = RowLayout(images)
        self.released = released
        self.lxmert: Any = LxmertModel(config)
        for module in self.lxmert.encoder.modules():
            if isinstance(module, LxmertAttention):
                attend_in_rows(module)
        last: Any = self.lxmert.encoder.x_layers[-1]
        last.cross_att, last.self_att = partial(_cross_attend, last), partial(_self_attend, last)
        wide = 2 * config.hidden_size
        self.logit_fc = nn.Sequential(
            nn.Linear(images * config.hidden_size, wide),
            nn.GELU(),
            nn.LayerNorm(wide, eps=_LAYER_NORM_EPS),
            nn.Linear(wide, num_labels),
        )
        if config.pad_token_id is not None:  # transformers uses row 0 whatever its configuration says
            self.lxmert.embeddings.word_embeddings.padding_idx = config.pad_token_id
        if not released:
            for embedding in (self.lxmert.embeddings.position_embeddings, self.lxmert.embeddings.token_type_embeddings):
                embedding.padding_idx = None  # train position 0 and type 0 like the others
        self.apply(self._initialise)

    @classmethod
    def from_config(cls, config: LxmertConfig, facts: DataFacts) -> Lxmert:
        """Build the model with the configured head and fresh weights.

        Raises:
            ConfigError: the configuration contradicts the data or itself.
        """
        config.check()
        return cls(
            config.transformer(facts),
            images=config.images,
            num_labels=config.labels(facts),
            released=config.released,
            padding_free=config.padding_free,
        )

    def load_weights(self, source: str, matching: Matching | None = None) -> LoadReport:
        """Load the weights that ``model.checkpoint`` names."""
        try:
            if self._is_whole(source, matching):
                whole = self.pretrained()
                loaded, report = load_matched(
                    whole, source, matching, lambda made: rows_of(made, word_modules(made), ["answer_head"])
                )
                whole.load_state_dict(loaded.state_dict())
                return report
            return super().load_weights(source, matching)
        except CheckpointError as error:
            if os.path.exists(source):  # noqa: PTH110 (pathlib raises for a name that is too long)
                raise
            raise CheckpointError(
                f"{error}; for VQA and GQA, projects/lxmert/answer_head.py makes it of the pre-trained weights (see "
                "docs/lxmert.md)"
            ) from error

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> ModelOutput:
        """Score a batch of texts and image regions.

        Returns:
            Logits ``[B, labels]``; the pooled output ``[B * images, hidden]``; on request the text states (embedding,
            then every language and cross layer), and the attention maps of the language layers
            ``[rows, heads, T, T]``, the vision layers ``[..., R, R]`` and the cross layers from text to regions
            ``[..., T, R]``, in this order.

        Raises:
            DataError: the batch lacks text, features or boxes, or they do not fit the model.
        """
        whole = hidden_states or attentions
        encoded = self.encode(batch, attentions) if whole else self._run(batch, whole=False)
        logits = self.logit_fc(encoded.pooled.reshape(encoded.examples, -1))
        return ModelOutput(logits, encoded.pooled, tuple(encoded.text) if hidden_states else (), encoded.attentions)

    def attention_maps(self, batch: Batch) -> list[ExampleAttention]:
        """Return what every layer attends to in each example: language and vision layers, then both ways across.

        States are those of the cross layers, with their input first.
        """
        check_single(self.layout.images, batch)
        rows, encoder = self.layout.rows(batch), self.lxmert.encoder
        with _recorded(encoder) as (maps, crossed):
            self._run(batch, attentions=True)
        streams = [[stream.view(len(batch), -1, stream.shape[-1]) for stream in pair] for pair in crossed]
        longest, states = streams[0][0].shape[1], [torch.cat(pair, dim=1) for pair in streams]
        found = []
        for row, (tokens, regions) in enumerate(counts(rows)):
            text, image = torch.arange(tokens), torch.arange(longest, longest + regions)
            layers = _layer_maps(
                [map_[row] for map_ in maps], len(encoder.layer), len(encoder.r_layers), tokens, regions
            )
            both = parts(states, row, text, image)
            found.append(ExampleAttention(layers, text, corners(rows, row, regions), states=both))
        return found

    def encode(self, batch: Batch, attentions: bool = False) -> LxmertEncoded:
        """Run the transformer.

        Raises:
            DataError: as ``forward``.
        """
        return self._run(batch, attentions=attentions)

    def _run(self, batch: Batch, *, attentions: bool = False, whole: bool = True) -> LxmertEncoded:
        """Run the transformer; without ``whole``, the last layer computes what is pooled and no regions."""
        rows, encoder = self.layout.rows(batch), self.lxmert.encoder
        text, seen = self._embed(rows), encoder.visn_fc(rows.features, self._boxes(rows))
        streams = Stream(text, rows.text_mask), Stream(seen, rows.region_mask)
        words, regions = self.packings(*streams, attentions=attentions)
        text_mask = RowMask(self._score_mask(words.mask, text), words.blocks, regions.blocks)
        region_mask = RowMask(self._score_mask(regions.mask, text), regions.blocks, words.blocks)
        states, maps = [words.origin.collect(text)], []
        seen = regions.origin.collect(seen)
        for layer in encoder.layer:
            state, *attention = layer(states[-1], text_mask, output_attentions=attentions)
            states.append(state)
            maps += attention
        for layer in encoder.r_layers:
            seen, *attention = layer(seen, region_mask, output_attentions=attentions)
            maps += attention
        for layer in encoder.x_layers:
            if not whole and layer is encoder.x_layers[-1]:
                text_mask = text_mask._replace(chosen=words.first)
            state, seen, *attention = layer(states[-1], text_mask, seen, region_mask, output_attentions=attentions)
            states.append(state)
            maps += attention
        read = states[-1].index_select(0, words.first) if whole else states.pop()
        pooled = self.lxmert.pooler(read.unsqueeze(1))
        seen = regions.origin.spread(seen) if whole else seen
        return LxmertEncoded(States(states, words.origin), seen, pooled, tuple(maps), rows.examples)

    def pretrained(self) -> Any:
        """Return transformers' question-answering model, or for NLVR2 the transformer without its head."""
        from transformers import LxmertForQuestionAnswering

        if (self.layout.images or 1) > 1:
            return self.lxmert
        config, last = copy.deepcopy(self.lxmert.config), cast("nn.Linear", self.logit_fc[-1])
        config.num_qa_labels = last.out_features
        with torch.device("meta"):
            whole = LxmertForQuestionAnswering(config)
        whole.lxmert, whole.answer_head.logit_fc = self.lxmert, self.logit_fc
        return whole

    def perturbation_points(self) -> Mapping[str, Point]:
        """Return the looked-up word embedding (text) and the region features before their projection (image)."""
        return {
            "text": Point("lxmert.embeddings.word_embeddings", "output", self.layout.text_mask),
            "image": Point("lxmert.encoder.visn_fc.visn_fc", "input", self.layout.region_mask),
        }

    def other_points(self) -> Mapping[str, Point]:
        """Return the inputs of language layers (text) and vision layers (image), and then of cross layers (both)."""
        encoder, layout = "lxmert.encoder", self.layout
        config = self.lxmert.config
        cross = [f"{encoder}.x_layers.{n}" for n in range(config.x_layers)]
        language = [f"{encoder}.layer.{n}" for n in range(config.l_layers)]
        vision = [f"{encoder}.r_layers.{n}" for n in range(config.r_layers)]
        text = layer_points(
            (*language, *cross), {"text": layout.text_mask}, blocks=lambda batch: self._places(batch)[0]
        )
        image = layer_points(vision + cross, {"image": layout.region_mask}, blocks=lambda batch: self._places(batch)[1])
        seen = {key: replace(point, argument=_SEEN) for key, point in image.items() if point.module in cross}
        return {**text, **image, **seen}

    def _places(self, batch: Batch) -> tuple[Blocks, Blocks]:
        """Return where the positions that layers compute are in the text and among the regions."""
        rows = self.layout.rows(batch)
        streams = Stream(rows.input_ids, rows.text_mask), Stream(rows.features, rows.region_mask)
        text, regions = self.packings(*streams, attentions=False)
        return text.origin, regions.origin

    def later_layers(self) -> tuple[str, ...]:
        """Return the prefix of the cross-attention layers, which follow those of text and regions."""
        return ("lxmert.encoder.x_layers",)

    def head_prefixes(self) -> tuple[str, ...]:
        """Return the prefix of the answer head."""
        return ("logit_fc",)

    def _is_whole(self, source: str, matching: Matching | None) -> bool:
        """Return whether a transformers folder holds a usable answer head: the same number of labels, or named ones."""
        file = os.path.join(source, CONFIG_FILE)  # noqa: PTH118 (as below)
        if (self.layout.images or 1) > 1 or not os.path.isfile(file):  # noqa: PTH113 (as below)
            return False
        found = read_json(Path(file), "configuration")
        named = matching is not None and matching.moves("labels")
        as_many = found.get("num_qa_labels") == self.pretrained().config.num_qa_labels
        return found.get("architectures") == ["LxmertForQuestionAnswering"] and (named or as_many)

    def _embed(self, rows: Rows) -> Tensor:
        """Embed the texts: ``[N, T, hidden]``."""
        longest, length = self.lxmert.config.max_position_embeddings, rows.input_ids.shape[1]
        if length > longest:
            raise DataError(f"a text has {length} tokens, but the model has {longest} positions; cut texts to it")
        embedded: Tensor = self.lxmert.embeddings(rows.input_ids, rows.token_types.expand_as(rows.input_ids))
        return embedded

    def _boxes(self, rows: Rows) -> Tensor:
        """Return the first columns of every box, ``[N, R, box_dim]``."""
        wanted, given = self.lxmert.config.visual_pos_dim, rows.boxes.shape[-1]
        if given < wanted:
            raise DataError(f"the model reads boxes of {wanted} numbers, but those of the data have {given}")
        return rows.boxes[..., :wanted]

    def _score_mask(self, mask: Tensor | None, like: Tensor) -> Tensor | None:
        """Return the additive attention mask; see ``score_mask``."""
        return score_mask(mask, like, RELEASED_MASK if self.released else None)

    def _initialise(self, module: nn.Module) -> None:
        """Initialise a module as the release does."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.lxmert.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _layer_maps(maps: Sequence[Tensor], language: int, vision: int, tokens: int, regions: int) -> tuple[LayerMaps, ...]:
    """Return an example's maps ``[heads, queries, keys]``, in the order of computation, as those of layers."""
    widths = {"t": tokens, "r": regions}

    def real(map_: Tensor, ways: str) -> Tensor:
        return map_[:, : widths[ways[0]], : widths[ways[1]]].detach().float().cpu()

    alone, across = maps[: language + vision], maps[language + vision :]
    layers = [LayerMaps(f"language {n}", text_text=real(map_, "tt")) for n, map_ in enumerate(alone[:language], 1)]
    layers += [LayerMaps(f"vision {n}", image_image=real(map_, "rr")) for n, map_ in enumerate(alone[language:], 1)]
    for place in range(0, len(across), 4):
        out, back, text, image = across[place : place + 4]
        own = real(text, "tt"), real(out, "tr"), real(back, "rt"), real(image, "rr")
        layers.append(LayerMaps(f"cross {place // 4 + 1}", *own))
    return tuple(layers)


@contextmanager
def _recorded(encoder: nn.Module) -> Iterator[tuple[list[Tensor], list[tuple[Tensor, Tensor]]]]:
    """Record the maps of every attention in the order of computation, and the states around the cross layers.

    Transformers returns no maps of regions in cross layers.
    """
    from transformers.models.lxmert.modeling_lxmert import LxmertAttention, LxmertXLayer

    maps: list[Tensor] = []
    states: list[tuple[Tensor, Tensor]] = []

    def ask(module: nn.Module, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return given, {**named, "output_attentions": True}

    def keep(module: nn.Module, given: Any, output: Any) -> None:
        maps.append(output[1])

    def follow(module: nn.Module, given: Any, output: Any) -> None:
        if not states:
            states.append((given[0], given[_SEEN]))
        states.append(output[:2])

    handles = []
    for module in encoder.modules():
        if isinstance(module, LxmertAttention):
            handles += [module.register_forward_pre_hook(ask, with_kwargs=True), module.register_forward_hook(keep)]
        elif isinstance(module, LxmertXLayer):
            handles.append(module.register_forward_hook(follow))
    try:
        yield maps, states
    finally:
        for handle in handles:
            handle.remove()


def _cross_attend(
    layer: Any,
    lang_input: Tensor,
    lang_attention_mask: RowMask,
    visual_input: Tensor,
    visual_attention_mask: RowMask,
    output_x_attentions: bool = False,
) -> tuple[Any, Any]:
    """Run ``LxmertXLayer.cross_att`` without its regions, which become none, if only some tokens are to be computed."""
    given = lang_input, lang_attention_mask, visual_input, visual_attention_mask
    if getattr(lang_attention_mask, "chosen", None) is None:
        both: tuple[Any, Any] = type(layer).cross_att(layer, *given, output_x_attentions)
        return both
    return layer.visual_attention(lang_input, visual_input, ctx_att_mask=visual_attention_mask), (visual_input[:0],)


def _self_attend(
    layer: Any, lang_input: Tensor, lang_attention_mask: RowMask, visual_input: Tensor, visual_attention_mask: RowMask
) -> tuple[Any, Any]:
    """Run ``LxmertXLayer.self_att`` for the tokens that are to be computed."""
    chosen = getattr(lang_attention_mask, "chosen", None)
    if chosen is not None:
        lang_attention_mask = lang_attention_mask._replace(context=lang_input)
        lang_input = lang_input.index_select(0, chosen)
    both: tuple[Any, Any] = type(layer).self_att(
        layer, lang_input, lang_attention_mask, visual_input, visual_attention_mask
    )
    return both
