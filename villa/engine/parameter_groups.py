"""Parameter groups by weight decay and learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import nn

from villa.errors import ConfigError, nearest
from villa.models.base import Model

Grouping = Literal["standard", "released", "all"]

#: The released code does not decay parameters whose names contain one of these. It misses ``img_layer_norm.weight``,
#: ``pos_layer_norm.weight`` and the normalisation layers of heads.
_RELEASED_NO_DECAY = ("bias", "LayerNorm.bias", "LayerNorm.weight")
_NORMALISATIONS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def parameter_groups(
    model: Model,
    *,
    lr: float,
    weight_decay: float,
    grouping: Grouping = "standard",
    head_lr_multiplier: float = 1.0,
    lr_multipliers: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Group a model's trainable parameters by learning rate and weight decay.

    Args:
        model: the model; a sharded one must report whole shapes.
        lr: base learning rate.
        weight_decay: weight decay of the parameters that decay.
        grouping: ``standard`` exempts biases, normalisation and other 1-d parameters from decay; ``released`` those
            whose names contain ``bias``, ``LayerNorm.bias`` or ``LayerNorm.weight``; ``all`` decays every parameter.
        head_lr_multiplier: factor on ``lr`` for the parameters below ``model.head_prefixes()``.
        lr_multipliers: factor on ``lr`` by the dotted name of a module or parameter; the longest match wins, also
            over the head's.

    Returns:
        Groups for a torch optimiser, by descending multiplier and with decayed parameters first, each with ``params``,
        ``names`` (in the same order), ``lr`` and ``initial_lr`` (``lr`` x multiplier), ``lr_multiplier`` and
        ``weight_decay``.

    Raises:
        ConfigError: a prefix matches nothing, a head's multiplier is given for a model without a head, or no parameter
            is trainable.
    """
    multipliers = _multipliers(model, head_lr_multiplier, lr_multipliers or {})
    spared = _no_decay(model, grouping)
    members: dict[tuple[float, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members.setdefault((_multiplier(name, multipliers), name not in spared), []).append((name, parameter))
    if not members:
        raise ConfigError(f"{type(model).__name__} has no trainable parameter; unfreeze a part of it")
    return [
        {
            "params": [parameter for _, parameter in members[key]],
            "names": [name for name, _ in members[key]],
            "lr": lr * key[0],
            "initial_lr": lr * key[0],
            "lr_multiplier": key[0],
            "weight_decay": weight_decay if key[1] else 0.0,
        }
        for key in sorted(members, reverse=True)
    ]


def _no_decay(model: nn.Module, grouping: Grouping) -> set[str]:
    if grouping == "all":
        return set()
    if grouping == "released":
        return {name for name, _ in model.named_parameters() if any(part in name for part in _RELEASED_NO_DECAY)}
    normalisations = {name for name, module in model.named_modules() if isinstance(module, _NORMALISATIONS)}
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim <= 1 or name.endswith("bias") or name.rpartition(".")[0] in normalisations
    }


def _multipliers(model: Model, head: float, others: Mapping[str, float]) -> dict[str, float]:
    prefixes = {prefix for name, _ in model.named_parameters() for prefix in _dotted_prefixes(name)}
    multipliers: dict[str, float] = {}
    if head != 1.0:
        heads = [prefix.removesuffix(".") for prefix in model.head_prefixes()]
        if not prefixes.intersection(heads):
            name = type(model).__name__
            raise ConfigError(f"optimizer.head_lr_multiplier is {head}, but {name} has no head; set it to 1")
        multipliers.update(dict.fromkeys(heads, head))
    for prefix, factor in others.items():
        if prefix not in prefixes:
            raise ConfigError(f"optimizer.lr_multipliers: no parameter is below '{prefix}'{nearest(prefix, prefixes)}")
        multipliers[prefix] = factor
    return multipliers


def _multiplier(name: str, multipliers: Mapping[str, float]) -> float:
    longest_first = reversed(list(_dotted_prefixes(name)))
    return next((multipliers[prefix] for prefix in longest_first if prefix in multipliers), 1.0)


def _dotted_prefixes(name: str) -> Iterator[str]:
    """Yield ``a``, ``a.b``, ``a.b.c`` for ``a.b.c``: whole parts, so that ``layer.1`` does not match ``layer.10``."""
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))
