"""Adam and its variants by torch's fused kernel."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from villa.checkpoints.tensors import local_part

#: Adam's weight decay: an L2 term in the gradient, or a shrinking of the weights before or after the step.
_Decay = Literal["l2", "before", "after"]

#: Parameter, gradient, and first and second moment.
_Tensors = tuple[Tensor, Tensor, Tensor, Tensor]

#: A step count at which Adam's bias corrections are exactly 1.
_WITHOUT_CORRECTION = math.inf


class FusedAdam(Optimizer):
    r"""Adam and its variants, with torch's fused kernel: one pass over memory, without temporary tensors.

    With gradient :math:`g` and step :math:`t`, of which each parameter counts its own:

    .. math::
        m &= \beta_1 m + (1 - \beta_1) g, \qquad v = \beta_2 v + (1 - \beta_2) g^2 \\
        p &= p - lr \cdot \frac{m}{1 - \beta_1^t} / (\sqrt{v / (1 - \beta_2^t)} + \epsilon)

    Parameters without a gradient do not change, and their step count does not advance.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: weight decay.
        decay: how weights decay: by an ``l2`` term in the gradient (Adam), or by the factor
            ``1 - lr * weight_decay``, ``before`` (AdamW) or ``after`` the step.
        correct_bias: whether to divide the moments by ``1 - beta ** t``.
        corrected_eps: whether epsilon is added to the corrected root (torch) or to that of :math:`v` itself.
        fused: use the fused kernel; other parameters than contiguous ones take torch's foreach operations.

    Attributes:
        grad_scale: positive scalar by which the next step divides all gradients; None for 1.
    """

    grad_scale: Tensor | None = None

    # torch's own are wrapped to be skipped by torch.compile, and the first call imports the compiler: half a start.
    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decay: _Decay = "before",
        correct_bias: bool = True,
        corrected_eps: bool = True,
        fused: bool | None = True,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decay": decay}
        options |= {"correct_bias": correct_bias, "corrected_eps": corrected_eps, "fused": fused}
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
            for (step, fused, *_), alike in self._alike(group).items():
                self._update(alike, step, group, fused=fused)
        self.grad_scale = None
        return loss

    def _alike(self, group: dict[str, Any]) -> dict[tuple[Any, ...], list[_Tensors]]:
        """Advance the step counts of a group's parameters with a gradient; return what one call can update together."""
        found: dict[tuple[Any, ...], list[_Tensors]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["step"] = int(state["step"]) + 1  # torch's Adam, and thus older checkpoints, count in a tensor
            tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
            parts = cast("_Tensors", tuple(map(local_part, tensors)))
            fused = group["fused"] and all(part.is_contiguous() for part in parts)  # the kernel ignores strides
            found.setdefault((state["step"], fused, parts[0].device, parts[0].dtype), []).append(parts)
        return found

    def _update(self, alike: Sequence[_Tensors], step: int, group: dict[str, Any], *, fused: bool) -> None:
        """Apply the formula to parameters of one device and dtype that have all taken ``step`` steps."""
        parameters, gradients, first, second = map(list, zip(*alike, strict=True))
        scale = self.grad_scale
        left = 1 - group["lr"] * group["weight_decay"] if group["decay"] == "after" else 1.0
        if not fused or left == 0:
            if scale is not None:
                torch._foreach_div_(gradients, scale.to(gradients[0].dtype))
            _update_unfused(parameters, gradients, first, second, step, group)
            return
        if scale is not None and gradients[0].dtype == torch.float64:  # the kernel's scale is in fp32
            torch._foreach_div_(gradients, scale)
            scale = None
        _, root = _corrections(group, step)
        count = float(step) if group["correct_bias"] else _WITHOUT_CORRECTION
        kernel = torch._fused_adam_ if group["decay"] == "l2" else torch._fused_adamw_
        kernel(
            parameters,
            gradients,
            first,
            second,
            [],
            [torch.full((), count, device=parameters[0].device)] * len(parameters),
            # A decay after the step also shrinks the step: p (1 - lr w) - lr (1 - lr w) ...
            lr=group["lr"] * left,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"] / left,
            eps=group["eps"] if group["corrected_eps"] else group["eps"] / root,
            amsgrad=False,
            maximize=False,
            grad_scale=None if scale is None else scale.float(),
        )


def _corrections(group: dict[str, Any], step: int) -> tuple[float, float]:
    """Return the bias corrections of the first moment and of the root of the second one."""
    beta1, beta2 = group["betas"]
    return (1 - beta1**step, math.sqrt(1 - beta2**step)) if group["correct_bias"] else (1.0, 1.0)


def _update_unfused(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    step: int,
    group: dict[str, Any],
) -> None:
    """Apply the formula of ``FusedAdam`` where there is no fused kernel for it."""
    (beta1, beta2), shrinking = group["betas"], group["lr"] * group["weight_decay"]
    if group["decay"] == "l2" and group["weight_decay"]:
        gradients = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
    if group["decay"] == "before" and shrinking:
        torch._foreach_mul_(parameters, 1 - shrinking)
    torch._foreach_mul_(first, beta1)
    torch._foreach_add_(first, gradients, alpha=1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)
    mean, root = _corrections(group, step)
    denominators = torch._foreach_sqrt(second)
    torch._foreach_add_(denominators, group["eps"] * (root if group["corrected_eps"] else 1.0))
    torch._foreach_addcdiv_(parameters, first, denominators, value=-group["lr"] * root / mean)
    if group["decay"] == "after" and shrinking:
        torch._foreach_add_(parameters, parameters, alpha=-shrinking)


class BertAdamW(FusedAdam):
    r"""Adam with decoupled weight decay, in the variant of the released code (FreeLB, UNITER and VILLA).

    It differs from ``torch.optim.AdamW`` in two places: epsilon is added to the *uncorrected* root of the second
    moment, and the decay comes after the step:

    .. math::
        p &= p - lr \sqrt{1 - \beta_2^t} / (1 - \beta_1^t) \cdot m / (\sqrt v + \epsilon) \\
        p &= p - lr \cdot weight\_decay \cdot p

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        correct_bias: whether to apply the bias corrections (the original BERT did not).
        fused: see ``FusedAdam``.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        fused: bool | None = True,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            decay="after",
            correct_bias=correct_bias,
            corrected_eps=False,
            fused=fused,
        )


class BertAdam(FusedAdam):
    r"""Adam without bias corrections, with weight decay as part of the step.

    .. math::
        p &= p - lr \cdot (m / (\sqrt v + \epsilon) + weight\_decay \cdot p)

    Like LXMERT's, and unlike some copies of the original, it does not clip gradients per parameter.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: weight decay.
        fused: see ``FusedAdam``.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        fused: bool | None = True,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, correct_bias=False, fused=fused)
