"""Optimisers by registered name, built on a model's parameter groups."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch.optim import Optimizer

from villa.engine.fused_adam import BertAdam, BertAdamW, FusedAdam
from villa.engine.parameter_groups import Grouping, parameter_groups
from villa.errors import ConfigError
from villa.models.base import Model
from villa.registry import register_optimizer

#: Device types with a fused kernel for Adam and AdamW.
_FUSED_DEVICES = {"cpu", "cuda"}


@dataclass
class OptimizerConfig:
    """Options of every optimiser.

    Attributes:
        name: the registered name.
        lr: learning rate.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: weight decay of the parameters that decay.
        grouping: which parameters decay: ``standard`` spares biases and all 1-d and normalisation parameters,
            ``released`` those that the released code spares, ``all`` none (see ``parameter_groups``).
        head_lr_multiplier: factor on ``lr`` for the task head.
        lr_multipliers: factor on ``lr`` by the dotted name of a module or parameter; the longest match wins.
        layer_decay: further factor on ``lr`` for every layer above a parameter (ELECTRA, BEiT): 0.9 trains the last
            layer at 0.9 of the head's rate, the one below at 0.81, and the embeddings at the lowest; 1 for none.
    """

    name: str = "adamw"
    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.01
    grouping: Grouping = "standard"
    head_lr_multiplier: float = 1.0
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    layer_decay: float = 1.0

    def check(self) -> None:
        """Check the ranges of all values.

        Raises:
            ConfigError: a value is out of its range.
        """
        _in_range("lr", self.lr, above=0.0)
        for beta in self.betas:
            _in_range("betas", beta, least=0.0, below=1.0)
        _in_range("eps", self.eps, above=0.0)
        _in_range("weight_decay", self.weight_decay, least=0.0)
        _in_range("head_lr_multiplier", self.head_lr_multiplier, least=0.0)
        for prefix, factor in self.lr_multipliers.items():
            _in_range(f"lr_multipliers of '{prefix}'", factor, least=0.0)
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"optimizer.layer_decay is {self.layer_decay}; give a number above 0 and at most 1")


def _in_range(
    option: str, value: float, *, least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> None:
    if least <= value < below and value > above:
        return
    bounds = {"at least": least, "above": above, "below": below}
    allowed = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
    raise ConfigError(f"optimizer.{option} is {value}; give a finite number {allowed}")


@dataclass
class FusableConfig(OptimizerConfig):
    """Options of the optimisers with a fused kernel.

    Attributes:
        fused: ``on`` uses torch's fused kernel, ``off`` its foreach operations, ``auto`` the fused kernel where every
            parameter's device has one.
    """

    fused: Literal["auto", "on", "off"] = "auto"


@dataclass
class BertAdamWConfig(FusableConfig):
    """Options of ``bert_adamw``.

    Attributes:
        correct_bias: False leaves out the bias corrections.
    """

    name: str = "bert_adamw"
    correct_bias: bool = True


@dataclass
class BertAdamConfig(FusableConfig):
    """Options of ``bert_adam``: by default, those of LXMERT's released code, which decays every parameter."""

    name: str = "bert_adam"
    betas: tuple[float, float] = (0.9, 0.999)
    grouping: Grouping = "all"


class OptimizerFactory(ABC):
    """Builds an optimiser for a model. ``@register_optimizer`` registers a subclass.

    Args:
        config: an instance of ``Config``.

    Raises:
        ConfigError: a value of the configuration is out of range.
    """

    Config: ClassVar[type[OptimizerConfig]] = OptimizerConfig

    def __init__(self, config: Any) -> None:
        config.check()
        self.config = config

    @abstractmethod
    def build(self, model: Model) -> Optimizer:
        """Return the optimiser of the model's trainable parameters.

        Raises:
            ConfigError: the options do not fit the model (see ``parameter_groups``).
        """

    def groups(self, model: Model) -> list[dict[str, Any]]:
        """Return the model's parameter groups (see ``parameter_groups``)."""
        return parameter_groups(
            model,
            lr=self.config.lr,
            weight_decay=self.config.weight_decay,
            grouping=self.config.grouping,
            head_lr_multiplier=self.config.head_lr_multiplier,
            lr_multipliers=self.config.lr_multipliers,
            layer_decay=self.config.layer_decay,
        )

    def options(self) -> dict[str, Any]:
        """Return the options common to all Adam variants."""
        return {"lr": self.config.lr, "betas": tuple(self.config.betas), "eps": self.config.eps}


class FusableFactory(OptimizerFactory):
    """Base of the optimisers with a fused kernel."""

    Config = FusableConfig

    def arguments(self, model: Model) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the model's parameter groups and the options, with ``fused`` resolved to True or, for off, None."""
        groups, choice = self.groups(model), self.config.fused
        devices = {parameter.device.type for group in groups for parameter in group["params"]}
        fused = choice == "on" or (choice == "auto" and devices <= _FUSED_DEVICES) or None
        return groups, {**self.options(), "fused": fused}


@register_optimizer("adamw")
class AdamW(FusableFactory):
    """AdamW as in torch: decoupled weight decay, before the step."""

    def build(self, model: Model) -> Optimizer:
        """Build ``FusedAdam`` with decay before the step."""
        groups, options = self.arguments(model)
        return FusedAdam(groups, **options)


@register_optimizer("adam")
class Adam(FusableFactory):
    """Adam as in torch: its weight decay is an L2 term in the gradient."""

    def build(self, model: Model) -> Optimizer:
        """Build ``FusedAdam`` with an L2 term."""
        groups, options = self.arguments(model)
        return FusedAdam(groups, **options, decay="l2")


@register_optimizer("adamax")
class Adamax(OptimizerFactory):
    """``torch.optim.Adamax``: Adam with the infinity norm; its weight decay is an L2 term in the gradient."""

    def build(self, model: Model) -> Optimizer:
        """Build ``torch.optim.Adamax``."""
        return torch.optim.Adamax(self.groups(model), **self.options())


@register_optimizer("bert_adamw")
class BertAdamWFactory(FusableFactory):
    """The AdamW of the released code (see ``BertAdamW``)."""

    Config = BertAdamWConfig

    def build(self, model: Model) -> Optimizer:
        """Build ``BertAdamW``."""
        groups, options = self.arguments(model)
        return BertAdamW(groups, **options, correct_bias=self.config.correct_bias)


@register_optimizer("bert_adam")
class BertAdamFactory(FusableFactory):
    """The Adam of LXMERT's released code (see ``BertAdam``); its schedule is ``warmup_linear``."""

    Config = BertAdamConfig

    def build(self, model: Model) -> Optimizer:
        """Build ``BertAdam``."""
        groups, options = self.arguments(model)
        return BertAdam(groups, **options)
