"""The interface of models: a forward pass on a batch, and the points where perturbations are added."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from villa.batch import Batch
from villa.checkpoints.load_report import LoadReport
from villa.errors import ConfigError
from villa.facts import DataFacts, PixelScale, RowKind, Task, Written
from villa.models.attention import ExampleAttention
from villa.models.loading import InitialRows, load_weights
from villa.models.matching import Matching, rows_of
from villa.models.packing import Blocks

__all__ = [
    "DataFacts",
    "InitialRows",
    "Model",
    "ModelConfig",
    "ModelOutput",
    "Point",
    "RowKind",
    "Task",
    "Written",
]


@dataclass(frozen=True)
class ModelOutput:
    """The output of a forward pass.

    Attributes:
        logits: ``[rows, labels]``, for the loss and the KL term. A generative model has a row per token of
            ``Batch.answer_mask``, masked modelling a row per masked token or region, and a dual encoder a row per
            image, with the texts of the batch as labels.
        pooled: ``[rows, hidden]`` pooled output, if the model has one.
        hidden_states: embedding output and the output of every layer, ``[rows, L, hidden]`` each, on request.
        attentions: attention maps of every layer, ``[rows, heads, L, L]`` each, on request.
        embeddings: unit-length embeddings of images and texts, ``[B, D]`` each, of a dual encoder.
        image_features: ``[B, D]`` embeddings of the images before they are scaled to unit length, of a dual encoder
            that reads images alone.
        extras: other floating-point tensors that a loss reads, by name, such as the logits of an objective's parts.
    """

    logits: Tensor
    pooled: Tensor | None = None
    hidden_states: tuple[Tensor, ...] = ()
    attentions: tuple[Tensor, ...] = ()
    embeddings: tuple[Tensor, Tensor] | None = None
    image_features: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def map_scores(self, function: Callable[[Tensor], Tensor]) -> ModelOutput:
        """Return an output with ``function`` applied to the logits and to all ``extras``; itself if none changes."""
        logits, extras = function(self.logits), {name: function(value) for name, value in self.extras.items()}
        same = logits is self.logits and all(value is self.extras[name] for name, value in extras.items())
        return self if same else replace(self, logits=logits, extras=extras)


@dataclass(frozen=True)
class Point:
    """A tensor inside a model to which a perturbation is added.

    Attributes:
        module: dotted path below the model, as in ``named_modules()``.
        side: whether to perturb the module's ``"output"`` or its first ``"input"``; a ``[rows, tokens, width]`` tensor.
        mask: maps a batch to ``[rows, tokens]`` bool, True where the perturbation may be non-zero; None means
            everywhere.
        argument: keyword, or position, of the argument to perturb instead of the first input.
        layout: ``channels_first`` for ``[rows, width, height, width]`` maps (patch embeddings), whose spatial
            dimensions are flattened into ``tokens``; ``images`` for ``[..., 3, height, width]``, whose rows are images.
        confined: never perturb positions outside the mask, even with ``mask_padding=false``: they are not padding but
            belong to another modality, or are masked.
        blocks: maps a batch to the rows of a value without padding, ``[P, width]``; None if it has rows.
        scale: scale of pixel values. The perturbation is then one of colours, which it keeps within [0, 1].
    """

    module: str
    side: Literal["input", "output"]
    mask: Callable[[Batch], Tensor | None] = field(default=lambda batch: None)
    argument: str | int | None = None
    layout: Literal["tokens", "channels_first", "images"] = "tokens"
    confined: bool = False
    blocks: Callable[[Batch], Blocks] | None = None
    scale: PixelScale | None = None


@dataclass
class ModelConfig:
    """Options shared by all models.

    Attributes:
        name: the registered name.
        checkpoint: weights to start from: a file, a run folder, or a transformers folder.
    """

    name: str = "uniter"
    checkpoint: str | None = None


class Model(nn.Module, ABC):
    """Base of all models. A subclass knows nothing about adversaries, parallelism or the training loop.

    Attributes:
        Config: the options class.
        initial_rows: parameters that are initialised from rows of others when the weights lack them.
    """

    Config: type[ModelConfig] = ModelConfig
    initial_rows: ClassVar[InitialRows] = {}

    @classmethod
    @abstractmethod
    def from_config(cls, config: Any, facts: DataFacts) -> Model:
        """Build the model with fresh weights.

        Args:
            config: an instance of ``cls.Config``.
            facts: sizes and names fixed by the data; the configuration must agree with them.

        Raises:
            ConfigError: the configuration contradicts the data or itself.
        """

    @classmethod
    def restore(cls, config: Any, facts: DataFacts, assets: Path) -> Model:
        """Build a model whose weights are about to be loaded from a checkpoint.

        Args:
            config: an instance of ``cls.Config``.
            facts: sizes and names fixed by the data.
            assets: folder that ``save_assets`` wrote beside the checkpoint.
        """
        return cls.from_config(config, facts)

    def save_assets(self, folder: Path) -> None:
        """Write the files that ``restore`` needs besides the configuration into ``folder``; none by default."""

    def named_rows(self) -> Mapping[str, RowKind]:
        """Return the parameters whose rows stand for word-pieces or labels, with the kind of row.

        By default they are found from the structure: the embedding at which text is perturbed, the decoder tied to
        it, and the last linear layer of the head.
        """
        point = self.perturbation_points().get("text")
        modules = dict(self.named_modules())
        words = modules.get(point.module) if point is not None else None
        return rows_of(self, [words] if isinstance(words, nn.Embedding) else [], self.head_prefixes())

    def load_weights(self, source: str, matching: Matching | None = None) -> LoadReport:
        """Load the weights that ``model.checkpoint`` names.

        Args:
            source: a file or folder.
            matching: matches the rows of the weights to those of the data by name; None keeps their order.

        Returns:
            A readable report of what was loaded and what stays fresh.

        Raises:
            CheckpointError: there are no weights, or they belong to another model.
        """
        return load_weights(self, source, matching, rows=self.named_rows(), initial=self.initial_rows)

    def pretrained(self) -> Any:
        """Return a transformers model that shares the parameters, perhaps all but those of the head.

        Saved folders hold this model. None (the default) if transformers has no such model.
        """
        return None

    def predictions(self, batch: Batch, output: ModelOutput) -> Tensor | Written:
        """Return what the data set decodes: the logits, unless the model has to generate its answer."""
        return output.logits

    @abstractmethod
    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> ModelOutput:
        """Run the model on a batch; return hidden states and attention maps on request."""

    def attention_maps(self, batch: Batch) -> list[ExampleAttention]:
        """Return what the model attends to in each example, cut by modality; by default no model says.

        Raises:
            ConfigError: the model has no attention between text and image, or its maps are not known.
        """
        raise ConfigError(
            f"{type(self).__name__} returns no attention between text and image: it encodes them apart (a dual "
            "encoder), or does not tell which positions are text and image (Model.attention_maps)"
        )

    @abstractmethod
    def perturbation_points(self) -> Mapping[str, Point]:
        """Return the perturbation point of each modality: ``{"text": ..., "image": ...}``; either may be absent."""

    def other_points(self) -> Mapping[str, Point]:
        """Return further perturbation points by ``modality.name``; none by default.

        ``image.pixels`` is that of whole images, and ``text.layer.3`` the text tokens in the input of a layer, counted
        from 0.
        """
        return {}

    def embeds_images(self) -> bool:
        """Return whether a batch of images alone gets ``ModelOutput.image_features``, as in a dual encoder."""
        return False

    def scores_label_texts(self) -> bool:
        """Return whether the logits are those of images against the texts of the labels, which are not trained."""
        return False

    def stochastic(self) -> bool:
        """Return whether training passes draw random numbers, such as dropout masks; True if this is not known.

        If not, methods may share passes that would otherwise differ in their draws.
        """
        return True

    def later_layers(self) -> tuple[str, ...]:
        """Return the dotted prefixes of lists of layers that read the output of the other lists, in order.

        By default all lists are taken to lie side by side, such as one for texts and one for images.
        """
        return ()

    def head_prefixes(self) -> tuple[str, ...]:
        """Return the parameter-name prefixes of the task head, which may have its own learning rate."""
        return ()


def layer_points(
    layers: Iterable[str], masks: Mapping[str, Callable[[Batch], Tensor | None]], **options: Any
) -> dict[str, Point]:
    """Return a point for every layer and modality: the layer's input, at the positions of the modality alone.

    Args:
        layers: dotted paths of the layers, in order.
        masks: by modality, the mask of its real positions.
        options: other attributes of the points.
    """
    return {
        f"{modality}.layer.{number}": Point(path, "input", mask, confined=True, **options)
        for number, path in enumerate(layers)
        for modality, mask in masks.items()
    }


def pixel_points(module: str, mask: Callable[[Batch], Tensor | None], scale: PixelScale | None) -> dict[str, Point]:
    """Return the point of whole images at a module that reads them, or nothing if their scale is not known."""
    if scale is None:
        return {}
    return {"image.pixels": Point(module, "input", mask, layout="images", confined=True, scale=scale)}


def summary(points: Iterable[str]) -> list[str]:
    """Return the names of a modality's points in ``Model.other_points``, with layers as ``layer.0 to layer.11``."""
    names = [key.partition(".")[2] for key in points]
    layers = [name for name in names if name.startswith("layer.")]
    ranges = [f"{layers[0]} to {layers[-1]}"] if len(layers) > 1 else layers
    return [name for name in names if name not in layers] + ranges


def has_dropout(model: nn.Module) -> bool:
    """Return whether a model has dropout: layers, or rates above 0 in attributes that are named so."""
    layers = (module.p for module in model.modules() if isinstance(module, _DropoutNd))
    named = (value for module in model.modules() for name, value in vars(module).items() if "drop" in name)
    return any(isinstance(rate, float) and rate > 0 for rate in (*layers, *named))
