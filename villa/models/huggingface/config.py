"""Options of the adapter for models of transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from villa.errors import ConfigError
from villa.models.base import ModelConfig


@dataclass
class HuggingFaceConfig(ModelConfig):
    """Options of a model of transformers.

    Attributes:
        architecture: model type (``clip``, ``llava``, ...), or a folder or hub name with its ``config.json``; None
            takes that of ``checkpoint``.
        options: change the architecture, by the names in its ``config.json``; those of a nested configuration in a
            mapping: ``{text_config: {hidden_size: 64}}``.
        task: ``classification`` of labels, ``contrastive`` matching of images and texts, or ``generation`` of an
            answer; ``auto`` takes what the targets of the data ask for.
        model_class: class of transformers to build; None chooses it by the task.
        num_labels: classes; None takes the data's.
        points: perturbation points to use instead of those found, by modality: ``path.to.module`` is perturbed at its
            output, ``path.to.module:input`` at its first input, ``path.to.module:name`` at its keyword argument
            ``name``.
        freeze: dotted names of modules or parameters that are not trained.
        lora_rank: rank of low-rank adapters (LoRA), the only part of the transformer that is then trained; 0 for none.
        lora_alpha: scale of the adapters, relative to the rank.
        lora_dropout: dropout before the adapters.
        lora_targets: last parts of the names of linear layers that get one; None for all.
        max_new_tokens: longest answer that is written, in tokens.
    """

    name: str = "huggingface"
    architecture: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    task: Literal["auto", "classification", "contrastive", "generation"] = "auto"
    model_class: str | None = None
    num_labels: int | None = None
    points: dict[str, str] = field(default_factory=dict)
    freeze: list[str] = field(default_factory=list)
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_targets: list[str] | None = None
    max_new_tokens: int = 16

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            ConfigError: naming the option.
        """
        if self.architecture is None and self.checkpoint is None:
            raise ConfigError(
                "model.architecture is missing: name a model type of transformers (clip, llava, ...) or a folder with "
                "its config.json, or give model.checkpoint"
            )
        if self.lora_rank < 0 or self.max_new_tokens < 1:
            name, least = ("lora_rank", 0) if self.lora_rank < 0 else ("max_new_tokens", 1)
            raise ConfigError(f"model.{name}={getattr(self, name)} is not allowed; give at least {least}")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"model.lora_dropout={self.lora_dropout} is not in [0, 1)")
        if not 0 < self.lora_alpha < float("inf"):
            raise ConfigError(f"model.lora_alpha={self.lora_alpha} is not allowed; give a positive number")
