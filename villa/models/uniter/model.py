"""UNITER (arXiv 1909.11740): one transformer over tokens and image regions, with a task head.

Parameters have their released names, so that the files of UNITER and VILLA load as they are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from villa.batch import Batch
from villa.errors import ConfigError
from villa.facts import DataFacts
from villa.models.attention import ExampleAttention, check_single, of_regions
from villa.models.base import Model, ModelOutput, Point, has_dropout, layer_points
from villa.models.dropout import Dropout
from villa.models.packing import Blocks, Packing, States
from villa.models.rows import Reads, RowLayout, Rows
from villa.models.two_heads import settle
from villa.models.uniter.config import HEADS, LAYER_NORM_EPS, UniterConfig, UniterSizes
from villa.models.uniter.layers import Encoder, ImageEmbeddings, Pooler, TextEmbeddings
from villa.registry import register_model


class Encoded(NamedTuple):
    """The transformer's output for N rows.

    Attributes:
        outputs: embedding output and output of every layer, ``[P, hidden]`` each. The last is the read part alone,
            ``[Q, hidden]``, unless all positions were asked for.
        attentions: maps of every layer, ``[N, heads, L, L]`` each, on request.
        rows: the encoded rows.
        packing: the positions.
        whole: whether the last layer was computed at all positions.
    """

    outputs: tuple[Tensor, ...]
    attentions: tuple[Tensor, ...]
    rows: Rows
    packing: Packing
    whole: bool = True

    @property
    def states(self) -> States:
        """Embedding output and output of every layer, ``[N, L, hidden]`` each.

        Raises:
            RuntimeError: the head says that it does not read all positions (``Uniter.reads``).
        """
        if not self.whole:
            raise RuntimeError(
                "the last layer was computed at the positions that the head reads alone; set reads='all'"
            )
        return States(self.outputs, self.packing.blocks)

    @property
    def mask(self) -> Tensor | None:
        """``[N, L]`` bool, True on real positions, or None when all are real."""
        return self.packing.mask

    @property
    def read(self) -> Tensor:
        """Last states of the positions that the head reads, row by row, ``[Q, hidden]``."""
        selection = self.packing.selection
        return self.outputs[-1].index_select(0, selection.chosen) if self.whole and selection else self.outputs[-1]

    @property
    def words(self) -> Tensor:
        """Last token states, ``[N, T, hidden]``; arbitrary where they were not read, or ``text_mask`` is False."""
        return self._originals[:, : self.rows.input_ids.shape[1]]

    @property
    def regions(self) -> Tensor:
        """Last region states, ``[N, R, hidden]``; arbitrary where they were not read, or ``region_mask`` is False."""
        return self._originals[:, self.rows.input_ids.shape[1] :]

    @property
    def _originals(self) -> Tensor:
        selection = self.packing.selection
        return (selection.origin if selection else self.packing.origin).spread(self.read)


class UniterModel(nn.Module):
    """The transformer without a head: embeddings, packing and layers, and the pooler for the heads to call."""

    def __init__(self, sizes: UniterSizes) -> None:
        super().__init__()
        self.padding_free = sizes.padding_free
        self.embeddings = TextEmbeddings(sizes)
        self.img_embeddings = ImageEmbeddings(sizes)
        self.dropout = Dropout(sizes.hidden_dropout)
        self.encoder = Encoder(sizes)
        self.pooler = Pooler(sizes)

    def forward(
        self, rows: Rows, reads: Reads = "all", *, hidden_states: bool = False, attentions: bool = False
    ) -> Encoded:
        """Encode rows.

        Args:
            rows: the rows.
            reads: what the head reads of the last layer.
            hidden_states: compute every layer at all positions.
            attentions: do so, and return attention maps.
        """
        text = self.embeddings(rows.input_ids, rows.token_types)
        types = self.embeddings.token_type_embeddings(rows.image_types)
        masked, features = rows.masked_regions, rows.features
        if masked is not None:
            features = features.masked_fill(masked.unsqueeze(-1), 0)
        image = self.img_embeddings(features, rows.boxes, types, masked)
        packing = Packing.of(rows, reads, self.padding_free)
        # What is dropped does not depend on how far the batch is padded.
        packed = self.dropout(packing.pack(text, image))
        whole = hidden_states or attentions or packing.selection is None
        outputs, maps = self.encoder(packed, packing, whole=whole, attentions=attentions)
        return Encoded(outputs, maps, rows, packing, whole)


@register_model("uniter")
class Uniter(Model):
    """UNITER with a task head; registered heads are subclasses that add modules and define ``score``.

    Args:
        sizes: sizes of the modules.
        num_labels: classes of the head.

    Attributes:
        images: images per example that the head reads; None for any number.
        joint: whether the images of an example share one row.
        types: default number of rows of the type embedding.
        labels: number of classes, if the task fixes it.
        fallback_labels: number of classes if neither the task nor the data gives one.
        reads: what ``score`` reads of the last layer, of which nothing else is computed. A subclass that defines
            ``score`` reads everything unless it says otherwise.
    """

    Config = UniterConfig
    images: ClassVar[int | None] = 1
    joint: ClassVar[bool] = False
    types: ClassVar[int] = 2
    labels: ClassVar[int | None] = None
    fallback_labels: ClassVar[int | None] = None
    reads: ClassVar[Reads] = "all"

    def __init_subclass__(cls, **options: Any) -> None:
        """Let a ``score`` of another class's ``reads`` have everything."""
        super().__init_subclass__(**options)
        if "score" in vars(cls) and "reads" not in vars(cls):
            cls.reads = "all"

    def __init__(self, sizes: UniterSizes, num_labels: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.num_labels = num_labels
        self.layout = RowLayout(
            self.images, self.joint, typed_images=(self.images or 1) > 1 and sizes.type_vocab_size > (self.images or 1)
        )
        self.uniter = UniterModel(sizes)
        self.add_head()
        self.apply(self._initialise)

    @classmethod
    def from_config(cls, config: UniterConfig, facts: DataFacts) -> Uniter:
        """Build the model with the configured head and fresh weights.

        Raises:
            ConfigError: the configuration contradicts the data or itself.
        """
        config.check()
        head: type[Uniter] = HEADS.get(config.head)
        found = facts.num_labels if facts.num_labels is not None else head.labels
        if config.num_labels is None and found is None:
            found = head.fallback_labels
        num_labels = settle("model.num_labels", config.num_labels, found)
        if head.labels not in (None, num_labels):
            raise ConfigError(f"head '{config.head}' has {head.labels} classes, but the data has {num_labels}")
        return head(config.sizes(facts, head.types), num_labels)

    @abstractmethod
    def add_head(self) -> None:
        """Add the head's modules, under their released names."""

    @abstractmethod
    def score(self, encoded: Encoded) -> tuple[Tensor, Tensor | None]:
        """Return the logits, and the pooled output ``[N, hidden]`` if the head uses it."""

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> ModelOutput:
        """Score a batch of texts and image regions.

        Raises:
            DataError: the batch lacks text, features or boxes, or they do not fit the head.
        """
        encoded = self.encode(batch, self.reads, hidden_states, attentions)
        logits, pooled = self.score(encoded)
        return ModelOutput(logits, pooled, tuple(encoded.states) if hidden_states else (), encoded.attentions)

    def encode(self, batch: Batch, reads: Reads, hidden_states: bool, attentions: bool) -> Encoded:
        """Run the transformer; see ``UniterModel.forward``."""
        encoded: Encoded = self.uniter(
            self.layout.rows(batch), reads, hidden_states=hidden_states, attentions=attentions
        )
        return encoded

    def attention_maps(self, batch: Batch) -> list[ExampleAttention]:
        """Return what every layer attends to in each example."""
        check_single(self.images, batch)
        encoded = self.encode(batch, "all", hidden_states=True, attentions=True)
        return of_regions(encoded.rows, encoded.attentions, encoded.states, packed=True)

    def pooled(self, encoded: Encoded) -> Tensor:
        """Return the pooled output ``[N, hidden]`` of a head that reads ``pooled`` or ``all``."""
        first = encoded.states[-1] if encoded.packing.selection is None else encoded.read.unsqueeze(1)
        output: Tensor = self.uniter.pooler(first)
        return output

    def stochastic(self) -> bool:
        """Return whether there is dropout."""
        return has_dropout(self)

    def perturbation_points(self) -> Mapping[str, Point]:
        """Return the looked-up word embedding (text) and the region features before their projection (image)."""
        return {
            "text": Point("uniter.embeddings.word_embeddings", "output", self.layout.text_mask),
            "image": Point("uniter.img_embeddings.img_linear", "input", self.layout.region_mask),
        }

    def other_points(self) -> Mapping[str, Point]:
        """Return the inputs of the layers, at text and at regions."""
        layers = [f"uniter.encoder.layer.{number}" for number in range(len(self.uniter.encoder.layer))]
        masks = {"text": self.layout.text_places, "image": self.layout.region_places}
        return layer_points(layers, masks, blocks=self._places)

    def _places(self, batch: Batch) -> Blocks:
        """Return where the positions that layers compute are in text followed by regions."""
        return Packing.of(self.layout.rows(batch), padding_free=self.uniter.padding_free).origin

    def _initialise(self, module: nn.Module) -> None:
        """Initialise a module as the release does; attention in NLVR2's head keeps torch's Xavier initialisation."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.sizes.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def mlp(sizes: UniterSizes, activation: nn.Module, num_labels: int) -> nn.Sequential:
    """Return the release's two-layer head: hidden to twice hidden, activation, LayerNorm, to ``num_labels``."""
    wide = 2 * sizes.hidden_size
    return nn.Sequential(
        nn.Linear(sizes.hidden_size, wide),
        activation,
        nn.LayerNorm(wide, eps=LAYER_NORM_EPS),
        nn.Linear(wide, num_labels),
    )
