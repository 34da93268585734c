"""What a model owes the rest of villa: a forward pass on a batch, and the points where it may be perturbed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from villa.batch import Batch
from villa.checkpoints.load_report import LoadReport
from villa.facts import DataFacts, RowKind, Task, Written
from villa.models.loading import InitialRows, load_weights
from villa.models.matching import Matching, rows_of

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
    """What a forward pass returns.

    Attributes:
        logits: ``[rows, labels]`` scores that the loss and the KL term read. A generative model has a row for each
            token of ``Batch.answer_mask``, a dual encoder one for each image, with the texts of the batch as labels;
            masked modelling has a row for each masked token or region.
        pooled: ``[rows, hidden]`` pooled output, where the model has one.
        hidden_states: embedding output and the output of every layer, ``[rows, L, hidden]``, on request.
        attentions: every layer's attention maps, ``[rows, heads, L, L]``, on request.
        embeddings: of a dual encoder: images and texts, ``[B, D]`` each, of unit length.
        extras: what else a loss reads, by name, floating: the logits of the parts of an objective, a distance ``[B]``.
    """

    logits: Tensor
    pooled: Tensor | None = None
    hidden_states: tuple[Tensor, ...] = ()
    attentions: tuple[Tensor, ...] = ()
    embeddings: tuple[Tensor, Tensor] | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def map_scores(self, function: Callable[[Tensor], Tensor]) -> ModelOutput:
        """Return the output with ``function`` applied to the logits and to every one of ``extras``."""
        extras = {name: function(value) for name, value in self.extras.items()}
        return replace(self, logits=function(self.logits), extras=extras)


@dataclass(frozen=True)
class Point:
    """A place where a perturbation is added.

    Attributes:
        module: dotted path below the model, as in ``named_modules()``.
        side: ``"output"`` of the module, or its first ``"input"``; a ``[rows, tokens, width]`` tensor.
        mask: gives ``[rows, tokens]`` bool for a batch, True where the perturbation may move; None for all.
        argument: keyword that the input is given by, instead of being the first one.
        layout: ``channels_first`` for ``[rows, width, height, width]`` maps (patch embeddings); several dimensions
            of ``tokens`` are taken as one.
        confined: what the mask leaves out is not just padding (it belongs to another modality, or is masked), and is
            never perturbed.
    """

    module: str
    side: Literal["input", "output"]
    mask: Callable[[Batch], Tensor | None] = field(default=lambda batch: None)
    argument: str | None = None
    layout: Literal["tokens", "channels_first"] = "tokens"
    confined: bool = False


@dataclass
class ModelConfig:
    """Options that every model has.

    Attributes:
        name: the registered name.
        checkpoint: weights to start from: a file, a run folder, or a folder of transformers.
    """

    name: str = "uniter"
    checkpoint: str | None = None


class Model(nn.Module, ABC):
    """Base of all models. A subclass knows nothing about adversaries, parallelism or the training loop.

    Attributes:
        Config: the class of its options.
        initial_rows: parameters that start from rows of others when a file of weights lacks them.
    """

    Config: type[ModelConfig] = ModelConfig
    initial_rows: ClassVar[InitialRows] = {}

    @classmethod
    @abstractmethod
    def from_config(cls, config: Any, facts: DataFacts) -> Model:
        """Build the model with fresh weights.

        Args:
            config: an instance of ``cls.Config``.
            facts: what the data fixes; a number that the configuration gives must agree with it.

        Raises:
            ConfigError: the configuration contradicts the data or itself.
        """

    @classmethod
    def restore(cls, config: Any, facts: DataFacts, assets: Path) -> Model:
        """Build a model whose weights are about to be loaded from a checkpoint.

        Args:
            config: an instance of ``cls.Config``.
            facts: what the data fixes.
            assets: folder with what ``save_assets`` wrote beside the checkpoint.
        """
        return cls.from_config(config, facts)

    def save_assets(self, folder: Path) -> None:
        """Write what ``restore`` needs besides the configuration into ``folder``; by default nothing."""

    def named_rows(self) -> Mapping[str, RowKind]:
        """Parameters with a row for every word-piece or label, and which.

        By default they are found from the structure: the embedding that text is perturbed at, with the decoder that
        shares its weight, and the last linear map of the head.
        """
        point = self.perturbation_points().get("text")
        modules = dict(self.named_modules())
        words = modules.get(point.module) if point is not None else None
        return rows_of(self, [words] if isinstance(words, nn.Embedding) else [], self.head_prefixes())

    def load_weights(self, source: str, matching: Matching | None = None) -> LoadReport:
        """Load the weights that ``model.checkpoint`` names.

        Args:
            source: a file or folder.
            matching: the names of rows beside the weights, against those of the data; None takes rows as they are.

        Returns:
            What was loaded and what stays fresh, for people.

        Raises:
            CheckpointError: there are no weights, or they are of another model.
        """
        return load_weights(self, source, matching, rows=self.named_rows(), initial=self.initial_rows)

    def pretrained(self) -> Any:
        """The model, or all of it but a head of its own, as a model of transformers that shares its parameters.

        That is how it is saved for others, and how it is read again. None (the default) where transformers has none.
        """
        return None

    def predictions(self, batch: Batch, output: ModelOutput) -> Tensor | Written:
        """What the data set decodes for a batch: the logits, unless the model has to do more for an answer."""
        return output.logits

    @abstractmethod
    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> ModelOutput:
        """Score a batch; return the hidden states of all layers or attention maps on request."""

    @abstractmethod
    def perturbation_points(self) -> Mapping[str, Point]:
        """Where each modality may be perturbed: ``{"text": ..., "image": ...}`` (either may be absent)."""

    def head_prefixes(self) -> tuple[str, ...]:
        """Prefixes of the parameter names of the task head, for its own learning rate."""
        return ()
