"""Parameter groups by weight decay and learning rate."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

from torch import nn

from villa.distributed.blocks import repeated_blocks
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
    layer_decay: float = 1.0,
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
        layer_decay: further factor on ``lr`` for every layer that lies above a parameter; see ``layers_above``.

    Returns:
        Groups for a torch optimiser, by descending multiplier and with decayed parameters first, each with ``params``,
        ``names`` (in the same order), ``lr`` and ``initial_lr`` (``lr`` x multiplier), ``lr_multiplier`` and
        ``weight_decay``.

    Raises:
        ConfigError: a prefix matches nothing, a head's multiplier is given for a model without a head, layers are to
            decay in a model without layers, or no parameter is trainable.
    """
    multipliers = _multipliers(model, head_lr_multiplier, lr_multipliers or {})
    spared, above = _no_decay(model, grouping), {} if layer_decay == 1.0 else layers_above(model)
    members: dict[tuple[float, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = multipliers.get(longest_match(name, multipliers) or "", 1.0) * layer_decay ** above.get(name, 0)
            members.setdefault((factor, name not in spared), []).append((name, parameter))
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
    multipliers: dict[str, float] = {}
    if head != 1.0:
        heads = _heads(model)
        if not any(longest_match(name, heads) for name, _ in model.named_parameters()):
            name = type(model).__name__
            raise ConfigError(f"optimizer.head_lr_multiplier is {head}, but {name} has no head; set it to 1")
        multipliers.update(dict.fromkeys(heads, head))
    check_prefixes("optimizer.lr_multipliers", others, model)
    return multipliers | dict(others)


def _heads(model: Model) -> list[str]:
    return [prefix.removesuffix(".") for prefix in model.head_prefixes()]


def longest_match(name: str, prefixes: Collection[str]) -> str | None:
    """Return the longest of the dotted prefixes of a parameter's name that is among ``prefixes``."""
    longest_first = reversed(list(_dotted_prefixes(name)))
    return next((prefix for prefix in longest_first if prefix in prefixes), None)


def check_prefixes(option: str, given: Iterable[str], model: nn.Module) -> None:
    """Check that a parameter of the model lies below every prefix.

    Raises:
        ConfigError: naming the first without one.
    """
    known = {prefix for name, _ in model.named_parameters() for prefix in _dotted_prefixes(name)}
    for prefix in given:
        if prefix not in known:
            raise ConfigError(f"{option}: no parameter is below '{prefix}'{nearest(prefix, known)}")


def _dotted_prefixes(name: str) -> Iterator[str]:
    """Yield ``a``, ``a.b``, ``a.b.c`` for ``a.b.c``: whole parts, so that ``layer.1`` does not match ``layer.10``."""
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def layers_above(model: Model) -> dict[str, int]:
    """Return how many layers lie above each parameter; 0 for the head and all else behind the last layer.

    As in BEiT and ELECTRA, the last layer has one above it (the head), and the embeddings have all layers and the head.
    What is outside of layers lies just below those that come after it in its module; if none does, above all.

    Raises:
        ConfigError: the model has no layers.
    """
    depths = _depths(model)
    if not depths:
        raise ConfigError(
            f"optimizer.layer_decay: {type(model).__name__} has no list of layers; set it to 1, or give "
            "optimizer.lr_multipliers"
        )
    top, heads, order = max(depths.values()) + 1, _heads(model), _Order(model, depths)
    found = {}
    for name, parameter in model.named_parameters():
        layer = longest_match(name, depths)
        if longest_match(name, heads) or not parameter.ndim:  # a scalar is a temperature or the like
            depth = top
        else:
            depth = depths[layer] if layer else order.depth(name, top)
        found[name] = top - depth
    return found


def _depths(model: Model) -> dict[str, int]:
    """Return the depth of every layer by name, from 1: lists of layers are aligned at their ends, later ones follow."""
    stages: dict[int, dict[str, list[str]]] = {}
    later = model.later_layers()
    for name in repeated_blocks(model):
        found = longest_match(name, later)
        stage = stages.setdefault(later.index(found) if found else -1, {})
        stage.setdefault(name.rpartition(".")[0], []).append(name)
    depths: dict[str, int] = {}
    for _, stacks in sorted(stages.items()):
        end = max(depths.values(), default=0) + max(map(len, stacks.values()))
        for stack in stacks.values():
            depths |= {name: end - len(stack) + place for place, name in enumerate(stack, start=1)}
    return depths


class _Order:
    """Places parameters outside of layers by the order of their modules.

    Args:
        model: the model.
        depths: depth of every layer by name, from 1.
    """

    def __init__(self, model: nn.Module, depths: Mapping[str, int]) -> None:
        self._modules = dict(model.named_modules())
        self._below: dict[str, list[int]] = {}
        for name, depth in depths.items():
            for prefix in ("", *_dotted_prefixes(name)):
                self._below.setdefault(prefix, []).append(depth)

    def depth(self, name: str, top: int) -> int:
        """Return the depth of a parameter: just below the layers that come after it, or ``top`` if none does."""
        path, passed = name, 0
        while path:
            path, _, child = path.rpartition(".")
            if path not in self._below:
                continue
            children = [key for key, _ in self._modules[path].named_children()]
            later = children[children.index(child) + 1 :] if child in children else children
            names = (f"{path}.{key}" if path else key for key in later)
            above = [depth for name in names for depth in self._below.get(name, ()) if depth > passed]
            if above:
                return min(above) - 1
            passed = max(self._below[path])
        return top
