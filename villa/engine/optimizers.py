"""Optimisers by registered name, built on a model's parameter groups."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from villa.engine.parameter_groups import Grouping, parameter_groups
from villa.errors import ConfigError
from villa.models.base import Model
from villa.registry import register_optimizer


class BertAdamW(Optimizer):
    r"""Adam with decoupled weight decay, in the variant of the released code (FreeLB, UNITER and VILLA).

    With gradient :math:`g` and step :math:`t`, it differs from ``torch.optim.AdamW`` in two places: epsilon is
    added to the *uncorrected* root of the second moment, and the decay comes after the step:

    .. math::
        m &= \beta_1 m + (1 - \beta_1) g, \qquad v = \beta_2 v + (1 - \beta_2) g^2 \\
        p &= p - lr \sqrt{1 - \beta_2^t} / (1 - \beta_1^t) \cdot m / (\sqrt v + \epsilon) \\
        p &= p - lr \cdot weight\_decay \cdot p

    Parameters without a gradient do not change, and their step count does not advance.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        correct_bias: whether to apply the bias corrections (the original BERT did not).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters that have a gradient.

        Args:
            closure: re-evaluates the loss and returns it, as in ``torch.optim``.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for step, parameters in self._by_step(group["params"]).items():
                self._update(parameters, step, group)
        return loss

    def _by_step(self, parameters: list[Tensor]) -> dict[int, list[Tensor]]:
        """Advance the step count of parameters with a gradient; return them grouped by step count."""
        groups: dict[int, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["step"] += 1
            groups.setdefault(int(state["step"]), []).append(parameter)
        return groups

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        """Apply the class's formula to parameters that have all taken ``step`` steps."""
        beta1, beta2 = group["betas"]
        gradients = [cast("Tensor", parameter.grad) for parameter in parameters]
        first = [self.state[parameter]["exp_avg"] for parameter in parameters]
        second = [self.state[parameter]["exp_avg_sq"] for parameter in parameters]
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, gradients, alpha=1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(parameters, first, denominators, value=-_step_size(group, step))
        if group["weight_decay"] > 0:
            torch._foreach_add_(parameters, parameters, alpha=-group["lr"] * group["weight_decay"])


def _step_size(group: dict[str, Any], step: int) -> float:
    """Return the learning rate with both bias corrections."""
    if not group["correct_bias"]:
        return float(group["lr"])
    beta1, beta2 = group["betas"]
    return float(group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step))


class BertAdam(BertAdamW):
    r"""Adam without bias corrections, with weight decay as part of the step.

    .. math::
        m &= \beta_1 m + (1 - \beta_1) g, \qquad v = \beta_2 v + (1 - \beta_2) g^2 \\
        p &= p - lr \cdot (m / (\sqrt v + \epsilon) + weight\_decay \cdot p)

    Unlike ``BertAdamW``, it decays the parameter's value before the step. Like LXMERT's, and unlike some copies of the
    original, it does not clip gradients per parameter.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: weight decay.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, correct_bias=False)

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        """Decay the parameters, then take the base class's step without its decay."""
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        super()._update(parameters, step, group | {"weight_decay": 0.0})


#: Device types with a fused kernel for Adam and AdamW.
_FUSED_DEVICES = ("cpu", "cuda")


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
    """

    name: str = "adamw"
    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.01
    grouping: Grouping = "standard"
    head_lr_multiplier: float = 1.0
    lr_multipliers: dict[str, float] = field(default_factory=dict)

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
        fused: ``on`` uses torch's fused kernel, ``off`` its foreach or loop implementation, ``auto`` the fused
            kernel where every parameter's device has one.
    """

    fused: Literal["auto", "on", "off"] = "auto"


@dataclass
class BertAdamWConfig(OptimizerConfig):
    """Options of ``bert_adamw``.

    Attributes:
        correct_bias: False leaves out the bias corrections.
    """

    name: str = "bert_adamw"
    correct_bias: bool = True


@dataclass
class BertAdamConfig(OptimizerConfig):
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
        )

    def options(self) -> dict[str, Any]:
        """Return the options common to all Adam variants."""
        return {"lr": self.config.lr, "betas": tuple(self.config.betas), "eps": self.config.eps}


def _fused(choice: str, groups: list[dict[str, Any]]) -> bool | None:
    """Translate the option ``fused`` for torch; None lets torch choose between foreach and a loop."""
    if choice != "auto":
        return choice == "on" or None
    return all(parameter.device.type in _FUSED_DEVICES for group in groups for parameter in group["params"]) or None


@register_optimizer("adamw")
class AdamW(OptimizerFactory):
    """``torch.optim.AdamW``: decoupled weight decay, before the step."""

    Config = FusableConfig

    def build(self, model: Model) -> Optimizer:
        """Build ``torch.optim.AdamW``."""
        groups = self.groups(model)
        return torch.optim.AdamW(groups, **self.options(), fused=_fused(self.config.fused, groups))


@register_optimizer("adam")
class Adam(OptimizerFactory):
    """``torch.optim.Adam``: its weight decay is an L2 term in the gradient."""

    Config = FusableConfig

    def build(self, model: Model) -> Optimizer:
        """Build ``torch.optim.Adam``."""
        groups = self.groups(model)
        return torch.optim.Adam(groups, **self.options(), fused=_fused(self.config.fused, groups))


@register_optimizer("adamax")
class Adamax(OptimizerFactory):
    """``torch.optim.Adamax``: Adam with the infinity norm; its weight decay is an L2 term in the gradient."""

    def build(self, model: Model) -> Optimizer:
        """Build ``torch.optim.Adamax``."""
        return torch.optim.Adamax(self.groups(model), **self.options())


@register_optimizer("bert_adamw")
class BertAdamWFactory(OptimizerFactory):
    """The AdamW of the released code (see ``BertAdamW``)."""

    Config = BertAdamWConfig

    def build(self, model: Model) -> Optimizer:
        """Build ``BertAdamW``."""
        return BertAdamW(self.groups(model), **self.options(), correct_bias=self.config.correct_bias)


@register_optimizer("bert_adam")
class BertAdamFactory(OptimizerFactory):
    """The Adam of LXMERT's released code (see ``BertAdam``); its schedule is ``warmup_linear``."""

    Config = BertAdamConfig

    def build(self, model: Model) -> Optimizer:
        """Build ``BertAdam``."""
        return BertAdam(self.groups(model), **self.options())
