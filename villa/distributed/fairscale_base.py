"""What both of fairscale's ways to share a model have in common: each process has gradients of its own part alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from villa.distributed.strategy import SharedStrategy
from villa.errors import ConfigError


class FairscaleStrategy(SharedStrategy):
    """After an update's last backward pass, a process has the sums of the gradients of its part, and no others."""

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """See the base class; all parts together are every gradient once."""
        given = list(parameters)
        own = super().gradient_norm(given).to(given[0].device)
        squared = own.double().square()
        dist.all_reduce(squared)
        return squared.sqrt().to(own.dtype)

    def unscale(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        """See the base class; an overflow in one process's part counts for all, also for one without any part."""
        super().unscale(scaler, optimizer)
        if scaler.is_enabled():
            found: dict[torch.device, Tensor] = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
            device = optimizer.param_groups[0]["params"][0].device
            overflow = found.setdefault(device, torch.zeros((), device=device))
            dist.all_reduce(overflow, dist.ReduceOp.MAX)

    def left_over(self, reduced: Mapping[str, bool], parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return the parameters with a gradient that the last pass has not reduced, on any process, in a fixed order.

        They took part in an earlier pass of the update, but not in its last.

        Args:
            reduced: by name, whether this process's last pass has reduced it; of every trainable parameter.
            parameters: in the same order.

        Raises:
            ConfigError: the last pass reached some parameters on some processes only, so that what fairscale has
                summed up does not belong together.
        """
        flags = [reduced.values(), (p.grad is not None for p in parameters)]
        counts = torch.tensor([[float(flag) for flag in row] for row in flags], device=parameters[0].device)
        counts[1] *= 1 - counts[0]
        dist.all_reduce(counts)
        for name, count in zip(reduced, counts[0].tolist(), strict=True):
            if count not in (0, self.processes.world_size):
                raise ConfigError(
                    f"distributed.strategy={self.config.strategy}: '{name}' took part in the last pass of "
                    f"{count:.0f} of {self.processes.world_size} processes, which fairscale cannot sum up; use ddp"
                )
        return [p for p, count in zip(parameters, counts[1].tolist(), strict=True) if count]
