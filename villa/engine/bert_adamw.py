"""AdamW as BERT's and VILLA's released training code computes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer


class BertAdamW(Optimizer):
    r"""Adam with decoupled weight decay, in the variant of the released code (FreeLB, UNITER and VILLA).

    With gradient :math:`g` and step :math:`t`, it differs from ``torch.optim.AdamW`` in two places: epsilon is
    added to the *uncorrected* root of the second moment, and the decay comes after the step:

    .. math::
        m &= \beta_1 m + (1 - \beta_1) g, \qquad v = \beta_2 v + (1 - \beta_2) g^2 \\
        p &= p - lr \sqrt{1 - \beta_2^t} / (1 - \beta_1^t) \cdot m / (\sqrt v + \epsilon) \\
        p &= p - lr \cdot weight\_decay \cdot p

    Parameters without a gradient are left as they are, and their step does not count.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        correct_bias: False leaves out the factor of the bias corrections (as the original BERT did).
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
            closure: evaluates the loss again and returns it, as in ``torch.optim``.

        Returns:
            What the closure returned.
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
        """Count a step for the parameters with a gradient; return them by their number of steps."""
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
        """Apply the formula of the class to parameters that have all taken ``step`` steps."""
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
    """Learning rate with both bias corrections."""
    if not group["correct_bias"]:
        return float(group["lr"])
    beta1, beta2 = group["betas"]
    return float(group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step))
