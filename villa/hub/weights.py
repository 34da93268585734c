"""The weights of a saved folder, under transformers' names if it has the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from villa.checkpoints.load_report import listed
from villa.checkpoints.transformers_folder import CONFIG_FILE, HEAD, load_pretrained, quiet
from villa.checkpoints.weight_files import read_weights, refuse_not_finite, write_weights
from villa.errors import CheckpointError, ConfigError
from villa.files import read_json, write_json
from villa.models.base import Model, ModelConfig

WEIGHTS = "model.safetensors"


def write(model: Model, config: ModelConfig, labels: tuple[str, ...] | None, folder: Path) -> None:
    """Write the weights and ``config.json`` of a model.

    Args:
        model: the model.
        config: its options in the recipe.
        labels: names of the classes, or None.
        folder: existing folder to write to.

    Raises:
        CheckpointError: the disk is full.
        OSError: transformers' error for the same.
    """
    inner = model.pretrained()
    if inner is None:
        write_weights(_on_cpu(model.state_dict()), folder / WEIGHTS)
        options = {name: value for name, value in asdict(config).items() if name != "checkpoint"}
        write_json(folder / CONFIG_FILE, {"model_type": "villa", "model": options, **_label_maps(labels)})
        return
    with quiet():
        inner.save_pretrained(folder)
    described = read_json(folder / CONFIG_FILE, "configuration")
    if described.get("use_cache") is False:  # set for training; generation wants the default
        del described["use_cache"]
    write_json(folder / CONFIG_FILE, {**described, **_label_maps(labels)})
    rest = _on_cpu(_own_parameters(model, inner))
    if rest:
        write_weights(rest, folder / HEAD)


def read_into(model: Model, folder: Path) -> None:
    """Load weights saved by ``write`` or transformers into a model of the same class and size.

    Raises:
        CheckpointError: the weights are missing, damaged or of another model.
        ConfigError: the model has adapters, which were merged into the weights when they were saved.
    """
    inner = model.pretrained()
    if inner is None:
        _load(model, read_weights(folder), folder)
        return
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise ConfigError(
            f"'{folder}' has no low-rank adapters: leave out model.lora_rank, or start another run with "
            f"model.checkpoint={folder}"
        )
    loaded, report = load_pretrained(type(inner), str(folder), inner.config)
    if report.missing:
        raise CheckpointError(f"'{folder}' lacks weights of the model: {listed(report.missing)}; use another folder")
    if report.unexpected:
        print(report, flush=True)
    _load(inner, loaded.state_dict(), folder)
    names = _own_parameters(model, inner)
    if names:
        _load(model, read_weights(folder / HEAD), folder, names)


def _own_parameters(model: Model, inner: Any) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model that are not in its transformers model ``inner``."""
    shared: Any = getattr(model, "transformer", inner)  # with merged adapters, inner is a copy
    inside = {id(value) for value in (*shared.parameters(), *shared.buffers())}
    own = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    names = {name for name, value in own if id(value) not in inside}
    return {name: value for name, value in model.state_dict().items() if name in names}


def _load(module: Any, weights: Mapping[str, Tensor], folder: Path, names: Mapping[str, Tensor] | None = None) -> None:
    expected = module.state_dict() if names is None else names
    for name in sorted(expected.keys() | weights.keys()):
        shapes = [list(state[name].shape) if name in state else "missing" for state in (weights, expected)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"'{folder}' is of another model: '{name}' is {shapes[0]} in it and {shapes[1]} here; use the recipe "
                "inside it as it is"
            )
    learned = dict(module.named_parameters(remove_duplicate=False))
    refuse_not_finite(folder, ((name, value) for name, value in weights.items() if name in learned))
    module.load_state_dict(weights, strict=names is None)


def _on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}


def _label_maps(labels: tuple[str, ...] | None) -> dict[str, Any]:
    if labels is None:
        return {}
    return {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }
