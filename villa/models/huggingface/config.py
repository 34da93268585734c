"""Options of the transformers adapter; freezing and low-rank adapters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from villa.errors import ConfigError, nearest
from villa.models.base import ModelConfig


@dataclass
class HuggingFaceConfig(ModelConfig):
    """Options of a transformers model.

    Attributes:
        architecture: model type (``clip``, ``llava``, ...), or a folder or hub name with a ``config.json``; None takes
            that of ``checkpoint``.
        options: changes to the architecture, under the names in its ``config.json``; nested configurations are
            mappings: ``{text_config: {hidden_size: 64}}``.
        task: ``classification``, ``contrastive`` matching of images and texts, or ``generation`` of an answer; ``auto``
            follows from the targets of the data.
        model_class: transformers class to build; None chooses it by the task.
        num_labels: classes; None takes the data's.
        points: perturbation points by modality, instead of those found: the output of ``path.to.module``, its first
            input with ``path.to.module:input``, or its keyword argument with ``path.to.module:name``.
        freeze: dotted names of modules or parameters that are not trained.
        lora_rank: rank of low-rank adapters (LoRA), then the only trained part of the transformer; 0 for none.
        lora_alpha: scale of the adapters, relative to the rank.
        lora_dropout: dropout before the adapters.
        lora_targets: last name components of the linear layers to adapt; None for all.
        max_new_tokens: maximum length of a generated answer in tokens.
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
        """Check the ranges of the options.

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


def adapt(transformer: nn.Module, config: HuggingFaceConfig) -> None:
    """Add low-rank adapters and freeze parameters, in place.

    Module paths do not change, so that perturbation points stay valid.

    Raises:
        ConfigError: a name matches nothing, or ``peft`` is not installed.
    """
    if config.lora_rank:
        _add_adapters(transformer, config)
    freeze(transformer, config.freeze)


def freeze(module: nn.Module, names: Sequence[str]) -> None:
    """Freeze parameters, by their dotted names or those of modules that contain them.

    Raises:
        ConfigError: a name matches nothing.
    """
    known = {prefix for name, _ in module.named_parameters() for prefix in _prefixes(name)}
    for wanted in names:
        if wanted not in known:
            raise ConfigError(f"model.freeze: no parameter is below '{wanted}'{nearest(wanted, known)}")
    for name, parameter in module.named_parameters():
        if not _prefixes(name).isdisjoint(names):
            parameter.requires_grad_(False)


def merged(transformer: nn.Module) -> nn.Module:
    """Return a copy with the adapters merged into the weights, or the transformer itself if it has none."""
    if not any(hasattr(module, "lora_A") for module in transformer.modules()):
        return transformer
    whole = copy.deepcopy(transformer)
    for name, module in list(whole.named_modules()):
        if hasattr(module, "lora_A"):
            layer: Any = module
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(whole.get_submodule(parent), child, layer.get_base_layer())
    return whole


def _add_adapters(transformer: nn.Module, config: HuggingFaceConfig) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            f"model.lora_rank={config.lora_rank} needs the package peft: pip install -c constraints.txt -e '.[lora]'"
        ) from error
    targets = config.lora_targets or _linear_layers(transformer)
    scale: Any = config.lora_alpha  # any number is fine, though the package says int
    options = LoraConfig(r=config.lora_rank, lora_alpha=scale, lora_dropout=config.lora_dropout, target_modules=targets)
    try:
        inject_adapter_in_model(options, transformer)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.lora_targets={targets} cannot get adapters: {reason}") from error


def _linear_layers(transformer: Any) -> list[str]:
    """Return the names of all linear layers except the output layer over the vocabulary."""
    scores = transformer.get_output_embeddings() if hasattr(transformer, "get_output_embeddings") else None
    layers = transformer.named_modules()
    return [name for name, module in layers if isinstance(module, nn.Linear) and module is not scores]


def _prefixes(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}
