"""Training a part of a transformer: frozen modules, and low-rank adapters (LoRA, arXiv 2106.09685) by ``peft``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from villa.errors import ConfigError, nearest
from villa.models.huggingface.config import HuggingFaceConfig


def adapt(transformer: nn.Module, config: HuggingFaceConfig) -> None:
    """Freeze what is not to be trained, and add low-rank adapters, in place.

    Paths of modules stay as they are, so that perturbation points do.

    Raises:
        ConfigError: a name matches nothing, or ``peft`` is not installed.
    """
    if config.lora_rank:
        _add_adapters(transformer, config)
    freeze(transformer, config.freeze)


def freeze(module: nn.Module, names: Sequence[str]) -> None:
    """Take parameters out of training, by their dotted names or those of modules above them.

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
    """Return a copy whose adapters are added into the weights, or the transformer itself when it has none."""
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
    """All linear layers but the one that scores words."""
    scores = transformer.get_output_embeddings() if hasattr(transformer, "get_output_embeddings") else None
    layers = transformer.named_modules()
    return [name for name, module in layers if isinstance(module, nn.Linear) and module is not scores]


def _prefixes(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}
