"""``distributed.strategy=ddp``: replicated models, with gradients summed once an update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from villa.distributed.strategy import SharedStrategy
from villa.models.base import Model

#: Bytes of a gradient bucket: torch's default for DistributedDataParallel.
_BUCKET_BYTES = 25 * 2**20


class DataParallel(SharedStrategy):
    """Replicated models, summed gradients.

    torch's ``DistributedDataParallel`` does not fit: it decides in a forward pass whether to reduce the backward pass
    and which parameters take part. Here the last backward pass of an update may span two forward passes, and only then
    is it known to be the last.
    """

    _reducer: GradientReducer | None = None

    def distribute(self, model: Model) -> None:
        """Copy rank 0's weights to all processes and hook the gradients."""
        copy_from_main(model)
        self._reducer = GradientReducer(model)

    @contextmanager
    def backward(self, *, reduce: bool) -> Iterator[None]:
        """Sum gradients over processes during the last backward pass of an update."""
        if not reduce or self._reducer is None:
            yield
            return
        with self._reducer.reducing():
            yield


def copy_from_main(model: nn.Module) -> None:
    """Broadcast parameters and buffers from rank 0, as rounding may differ between machines."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)


class GradientReducer:
    """Sums gradients over all processes in buckets, overlapping with the backward pass.

    A bucket is sent when all its gradients have arrived; buckets are sent in a fixed order. A gradient that no process
    has stays None; one that only some have counts as zero on the others.

    Args:
        model: the model; its trainable parameters are hooked.
        bucket_bytes: size of a bucket.
    """

    def __init__(self, model: nn.Module, bucket_bytes: int = _BUCKET_BYTES) -> None:
        # Backward passes reach the last parameters first.
        self.parameters = [p for p in reversed(list(model.parameters())) if p.requires_grad]
        self.buckets = _buckets(self.parameters, bucket_bytes)
        self._place = {p: number for number, bucket in enumerate(self.buckets) for p in bucket}
        self._missing: list[int] | None = None
        self._sent: list[tuple[Tensor, dist.Work]] = []
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]

    @contextmanager
    def reducing(self) -> Iterator[None]:
        """Sum gradients over processes; wraps the last backward pass of an update."""
        self._missing, self._sent = [len(bucket) for bucket in self.buckets], []
        try:
            yield
        finally:
            self._missing = None
        while len(self._sent) < len(self.buckets):
            self._send()
        used = torch.tensor([float(p.grad is not None) for p in self.parameters], device=_device(self.parameters))
        dist.all_reduce(used, dist.ReduceOp.MAX)
        somewhere = dict(zip(self.parameters, used.tolist(), strict=True))
        for bucket, (flat, work) in zip(self.buckets, self._sent, strict=True):
            work.wait()
            for parameter, summed in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(summed.view_as(parameter))
                elif somewhere[parameter]:
                    parameter.grad = summed.view_as(parameter).clone()
        self._sent = []

    def _arrived(self, parameter: nn.Parameter) -> None:
        if self._missing is None:
            return
        self._missing[self._place[parameter]] -= 1
        while len(self._sent) < len(self.buckets) and self._missing[len(self._sent)] == 0:
            self._send()

    def _send(self) -> None:
        """Start the all-reduce of the next bucket."""
        bucket = self.buckets[len(self._sent)]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self._sent.append((flat, work))


def _buckets(parameters: list[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """Cut parameters, in order, into buckets of one dtype and at most ``limit`` bytes, or one parameter."""
    buckets: list[list[nn.Parameter]] = []
    filled = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if not buckets or filled + size > limit or buckets[-1][0].dtype != parameter.dtype:
            buckets.append([])
            filled = 0
        buckets[-1].append(parameter)
        filled += size
    return buckets


def _device(parameters: list[nn.Parameter]) -> torch.device:
    return parameters[0].device if parameters else torch.device("cpu")
