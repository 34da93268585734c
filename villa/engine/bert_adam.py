"""The Adam that BERT was first trained with, which LXMERT uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from villa.engine.bert_adamw import BertAdamW


class BertAdam(BertAdamW):
    r"""Adam without bias corrections, whose weight decay is a part of the update.

    .. math::
        m &= \beta_1 m + (1 - \beta_1) g, \qquad v = \beta_2 v + (1 - \beta_2) g^2 \\
        p &= p - lr \cdot (m / (\sqrt v + \epsilon) + weight\_decay \cdot p)

    ``BertAdamW`` decays what the step has made of a parameter, this one what it was before. It does not clip
    gradients by parameter, as some copies of the original do; nor does LXMERT's.

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
        """Decay the parameters, then take the step of the class above without its own decay."""
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        super()._update(parameters, step, group | {"weight_decay": 0.0})
