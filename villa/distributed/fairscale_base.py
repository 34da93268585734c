"""What fairscale's two strategies share: each process has only the gradients of its own part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from villa.distributed.strategy import SharedStrategy, overflows


class FairscaleStrategy(SharedStrategy):
    """Base of fairscale's strategies: an update ends with each process having the summed gradients of its part only."""

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Return the global gradient norm; the processes' parts cover every gradient once."""
        given = list(parameters)
        own = super().gradient_norm(given).to(given[0].device)
        squared = own.double().square()
        dist.all_reduce(squared)
        return squared.sqrt().to(own.dtype)

    def total(self, sums: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Sum over processes."""
        dist.all_reduce(sums)
        return sums

    def unscale(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        """Unscale the gradients; an overflow on one process counts on all, even on those without a part."""
        super().unscale(scaler, optimizer)
        if scaler.is_enabled():
            device = optimizer.param_groups[0]["params"][0].device
            overflow = overflows(scaler, optimizer).setdefault(device, torch.zeros((), device=device))
            dist.all_reduce(overflow, dist.ReduceOp.MAX)
