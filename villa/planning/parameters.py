"""``villa_run --parameters``: which parameters train, with which learning rate and weight decay, by module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from villa.config.schema import RunConfig
from villa.engine.setup import within_memory
from villa.models.base import Model
from villa.planning.dry_run import facts_of
from villa.registry import MODELS, OPTIMIZERS

#: Part of the names of low-rank adapters, which train where their module does not.
_ADAPTER = "lora_"
#: A module with more of the parameters than this is shown by its parts.
_LARGE = 0.5


@dataclass(frozen=True)
class _Rate:
    """How a parameter trains: its learning rate and weight decay."""

    lr: float
    decay: float


@dataclass(frozen=True)
class _Row:
    """A module's parameters: numbers of them all, of the trained ones and of adapters, and their rates."""

    module: str
    count: int
    trained: int
    adapters: int
    rates: frozenset[_Rate]

    def same_but_for_place(self, other: _Row) -> bool:
        """Return whether two modules are neighbours in a list, and alike."""
        parts = [row.module.rpartition(".") for row in (self, other)]
        alike = (self.count, self.trained, self.adapters, self.rates)
        listed = parts[0][0] == parts[1][0] and parts[0][2].partition("-")[0].isdigit() and parts[1][2].isdigit()
        return listed and alike == (other.count, other.trained, other.adapters, other.rates)

    def cells(self) -> list[str]:
        """Return the columns of the table."""
        trained = {0: "none", self.count: "all"}.get(self.trained, _size(self.trained))
        adapters = " (LoRA)" if self.adapters and self.trained == self.adapters else ""
        return [
            self.module,
            _size(self.count),
            trained + adapters,
            ", ".join(f"{lr:g}" for lr in sorted({rate.lr for rate in self.rates}, reverse=True)) or "-",
            ", ".join(f"{decay:g}" for decay in sorted({rate.decay for rate in self.rates}, reverse=True)) or "-",
        ]


def describe_parameters(config: RunConfig) -> list[str]:
    """Describe in lines what an optimiser trains of a recipe's model, without loading or allocating weights.

    Args:
        config: the recipe; its data may be missing.

    Raises:
        ConfigError: the model cannot be built, or options of the optimiser do not fit it.
    """
    with torch.device("meta"), within_memory(config.model.name):
        model: Model = MODELS.get(config.model.name).from_config(config.model, facts_of(config))
    groups = OPTIMIZERS.get(config.optimizer.name)(config.optimizer).groups(model)
    rates = {name: _Rate(group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or not only) for only in (0, 1))
    lines = [
        f"{config.model.name}: {_size(total)} parameters, {_size(trained)} of them train",
        f"{config.optimizer.name}, learning rates at their peak (scheduler {config.scheduler.name})",
        "",
    ]
    rows = [row.cells() for row in _merged(_rows(model, "", rates, total))]
    lines += _table([["module", "parameters", "train", "learning rate", "weight decay"], *rows])
    numbered = [[str(number), *_group_cells(group)] for number, group in enumerate(groups, start=1)]
    lines += ["", *_table([["group", "parameters", "tensors", "learning rate", "weight decay", "first"], *numbered])]
    return [line.rstrip() for line in lines]


def _group_cells(group: Mapping[str, Any]) -> list[str]:
    count = sum(parameter.numel() for parameter in group["params"])
    names = f"{group['names'][0]}{', ...' * (len(group['names']) > 1)}"
    return [_size(count), str(len(group["params"])), f"{group['lr']:g}", f"{group['weight_decay']:g}", names]


def _rows(module: nn.Module, name: str, rates: Mapping[str, _Rate], total: int) -> Iterator[_Row]:
    """Yield the modules whose parameters train alike, and which are not too large a part of the model."""
    children = [(key, child) for key, child in module.named_children() if any(True for _ in child.parameters())]
    found = dict(module.named_parameters(prefix=name))
    count = sum(parameter.numel() for parameter in found.values())
    uniform = len({_kind(key, rates) for key in found if _ADAPTER not in key}) < 2
    listed = isinstance(module, nn.ModuleList) or name.rpartition(".")[2].isdigit()
    if name and (not children or (uniform and (listed or count <= _LARGE * total))):
        yield _row(name, found, rates)
        return
    own = {key: parameter for key, parameter in found.items() if "." not in key[len(name) :].lstrip(".")}
    if own:
        yield _row(f"{name or '(model)'} itself", own, rates)
    for key, child in children:
        yield from _rows(child, f"{name}.{key}" if name else key, rates, total)


def _kind(name: str, rates: Mapping[str, _Rate]) -> float | None:
    """Return the learning rate of a parameter, or None if it does not train."""
    return rates[name].lr if name in rates else None


def _row(module: str, found: Mapping[str, nn.Parameter], rates: Mapping[str, _Rate]) -> _Row:
    trained = {name: parameter.numel() for name, parameter in found.items() if name in rates}
    adapters = sum(count for name, count in trained.items() if _ADAPTER in name)
    count = sum(parameter.numel() for parameter in found.values())
    return _Row(module, count, sum(trained.values()), adapters, frozenset(rates[name] for name in trained))


def _merged(rows: Iterator[_Row]) -> list[_Row]:
    """Merge equal neighbours of a list of layers: ``layers.0-11``."""
    merged: list[_Row] = []
    numbers: list[int] = []
    for row in rows:
        if merged and numbers and merged[-1].same_but_for_place(row):
            numbers[-1] += 1
            first = merged[-1].module.partition("-")[0]
            last = row.module.rpartition(".")[2]
            merged[-1] = _Row(f"{first}-{last}", row.count, row.trained, row.adapters, row.rates)
            continue
        merged.append(row)
        numbers.append(1)
    return [
        _Row(row.module, number * row.count, number * row.trained, number * row.adapters, row.rates)
        for row, number in zip(merged, numbers, strict=True)
    ]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of columns; all but the first and, of names, the last are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 or rows[0][place] == "first" else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _size(count: int) -> str:
    """Return a number of parameters: ``110.3M``, ``1.5k``, ``12``."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.1f}{name}"
    return str(count)
