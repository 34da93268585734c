"""What both of fairscale's ways to share a model have in common: each process has gradients of its own part alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from villa.distributed.strategy import SharedStrategy, overflows


class FairscaleStrategy(SharedStrategy):
    """After an update's last backward pass, a process has the sums of the gradients of its part, and no others."""

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """See the base class; all parts together are every gradient once."""
        given = list(parameters)
        own = super().gradient_norm(given).to(given[0].device)
        squared = own.double().square()
        dist.all_reduce(squared)
        return squared.sqrt().to(own.dtype)

    def total(self, sums: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """See the base class."""
        dist.all_reduce(sums)
        return sums

    def unscale(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        """See the base class; an overflow in one process's part counts for all, also for one without any part."""
        super().unscale(scaler, optimizer)
        if scaler.is_enabled():
            device = optimizer.param_groups[0]["params"][0].device
            overflow = overflows(scaler, optimizer).setdefault(device, torch.zeros((), device=device))
            dist.all_reduce(overflow, dist.ReduceOp.MAX)
